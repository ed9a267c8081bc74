#!/usr/bin/env python3
"""Trains stage 1, the VQ-GAN: `python train_vqgan.py --config mnist`; `--help` shows the settings.

The same command again resumes a run that was stopped.
"""

import sys

from taming_jax.cli.train import train_vqgan as main
from taming_jax.errors import report

if __name__ == "__main__":
    sys.exit(report(main))
