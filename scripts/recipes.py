#!/usr/bin/env python3
"""The same as `taming-jax recipes`, for a checkout."""

from taming_jax.cli.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("recipes"))
