#!/usr/bin/env python3
"""The same as `taming-jax evaluate`, for a checkout."""

import sys

from taming_jax.cli.evaluate import main
from taming_jax.errors import report

if __name__ == "__main__":
    sys.exit(report(main))
