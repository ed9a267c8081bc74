#!/usr/bin/env python3
"""The same as `taming-jax recipes`, for a checkout."""

import sys

from taming_jax.cli.recipes import main
from taming_jax.errors import report

if __name__ == "__main__":
    sys.exit(report(main))
