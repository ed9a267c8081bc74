#!/usr/bin/env python3
"""Trains stage 1, the VQ-GAN: `python train_vqgan.py --config mnist`; `--help` shows the settings.

The same command again resumes a run that was stopped.
"""

import sys

from taming_jax.cli.arguments import parse_arguments
from taming_jax.errors import report


def main() -> None:
    given = parse_arguments(sys.argv[1:])
    # Heavy, and not needed to refuse a wrong flag.
    from taming_jax.parallel.distributed import join
    from taming_jax.training import train

    join(given.processes)
    train(given.config, "vqgan", restart=given.restart)


if __name__ == "__main__":
    sys.exit(report(main))
