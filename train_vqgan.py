#!/usr/bin/env python3
"""Trains stage 1, the VQ-GAN: `python train_vqgan.py --config mnist`; `--help` shows the settings.

The same command again resumes a run that was stopped.
"""

import functools
import sys

from taming_jax.cli.arguments import Command, parse_arguments
from taming_jax.errors import report


def work(given: Command) -> None:
    # Heavy, and not needed to answer a wrong flag.
    from taming_jax.training.loop import train
    from taming_jax.training.vqgan import build_stage

    stage = functools.partial(build_stage, restart=given.restart)
    train(stage, given.config, given.restart, own_process=True)


def main() -> None:
    given = parse_arguments(sys.argv[1:])
    from taming_jax.parallel.distributed import watched

    watched(functools.partial(work, given), given.processes)


if __name__ == "__main__":
    sys.exit(report(main))
