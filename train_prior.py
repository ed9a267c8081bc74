#!/usr/bin/env python3
"""Trains stage 2, the prior over the codes of a trained stage 1:
`python train_prior.py --config mnist`; `--help` shows the settings.

Data and stage 1 are those of the run in the workdir. The same command again resumes.
"""

import functools
import sys

from taming_jax.cli.arguments import Command, parse_arguments
from taming_jax.errors import report


def work(given: Command) -> None:
    # Heavy, and not needed to answer a wrong flag.
    from taming_jax.training.loop import train
    from taming_jax.training.prior import PriorStage

    stage = functools.partial(PriorStage, restart=given.restart)
    train(stage, given.config, given.restart, own_process=True)


def main() -> None:
    given = parse_arguments(sys.argv[1:], "prior")
    from taming_jax.parallel.distributed import watched

    watched(functools.partial(work, given), given.processes)


if __name__ == "__main__":
    sys.exit(report(main))
