"""Trains a stage."""

import sys

from taming_jax.cli.arguments import Training, parse_training


def train_vqgan() -> None:
    _train("vqgan", "Trains stage 1, the VQ-GAN.")


def train_prior() -> None:
    _train("prior", "Trains stage 2, the prior over the codes of stage 1.")


def _train(stage: str, description: str) -> None:
    args = parse_training(Training, sys.argv[1:], stage, description)
    # Imported late, so that --help and invalid flags need no heavy imports.
    from taming_jax.parallel.distributed import join
    from taming_jax.training import train

    join(args.processes)
    train(args.config, stage, restart=args.restart)
