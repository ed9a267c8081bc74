#!/usr/bin/env python3
"""Trains stage 2, the prior over the codes of a trained stage 1:
`python train_prior.py --config mnist`; `--help` shows the settings.

Data and stage 1 are those of the run in the workdir. The same command again resumes.
"""

import sys

from taming_jax.cli.arguments import parse_arguments
from taming_jax.errors import report


def main() -> None:
    given = parse_arguments(sys.argv[1:], "prior")
    # Heavy, and not needed to refuse a wrong flag.
    from taming_jax.parallel.distributed import join
    from taming_jax.training import train

    join(given.processes)
    train(given.config, "prior", restart=given.restart)


if __name__ == "__main__":
    sys.exit(report(main))
