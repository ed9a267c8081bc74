#!/usr/bin/env python3
"""Runs `taming-jax benchmark --report` from a checkout."""

import sys

from taming_jax.cli.__main__ import run

if __name__ == "__main__":
    sys.argv.insert(1, "--report")
    raise SystemExit(run("benchmark"))
