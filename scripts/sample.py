#!/usr/bin/env python3
"""Runs `taming-jax sample` from a checkout."""

from taming_jax.cli.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("sample"))
