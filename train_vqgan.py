#!/usr/bin/env python3
"""Trains stage 1, the VQ-GAN: `python train_vqgan.py --config mnist`; `--help` shows the settings.

Run the same command again to resume a run that was stopped.
"""

from taming_jax.cli.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("train-vqgan"))
