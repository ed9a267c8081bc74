#!/usr/bin/env python3
"""Trains stage 1, the VQ-GAN: `python train_vqgan.py --config mnist`; `--help` shows the settings.

The same command again resumes a run that was stopped.
"""

import sys

from taming_jax.config import parse_arguments
from taming_jax.errors import report


def main() -> None:
    config, restart = parse_arguments(sys.argv[1:])
    # Heavy, and not needed to answer a wrong flag.
    from taming_jax.train.loop import train
    from taming_jax.train.vqgan import VQGANStage

    train(VQGANStage, config, restart)


if __name__ == "__main__":
    sys.exit(report(main))
