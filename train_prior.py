#!/usr/bin/env python3
"""Trains stage 2, the prior over the codes of a trained stage 1:
`python train_prior.py --config mnist`; `--help` shows the settings.

Takes the data and stage 1 from the run in the workdir. Run the same command again to resume.
"""

from taming_jax.cli.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("train-prior"))
