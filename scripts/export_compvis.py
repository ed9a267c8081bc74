#!/usr/bin/env python3
"""The same as `taming-jax export compvis`, for a checkout."""

import sys

from taming_jax.cli.export_compvis import main
from taming_jax.errors import report

if __name__ == "__main__":
    sys.exit(report(main))
