#!/usr/bin/env python3
"""Trains stage 2, the prior over the codes of a trained stage 1:
`python train_prior.py --config mnist`; `--help` shows the settings.

Data and stage 1 are those of the run in the workdir. The same command again resumes.
"""

import sys

from taming_jax.cli.train import train_prior as main
from taming_jax.errors import report

if __name__ == "__main__":
    sys.exit(report(main))
