#!/usr/bin/env python3
"""Runs `taming-jax export compvis` from a checkout."""

from taming_jax.cli.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("export compvis"))
