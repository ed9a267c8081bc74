"""Uploads a run to the Hugging Face hub, with a model card.

    taming-jax evaluate --workdir runs/mnist
    taming-jax push user/mnist --workdir runs/mnist --license mit

Log in first with `hf auth login`, or set HF_TOKEN.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from taming_jax.cli.arguments import parse


@dataclass(frozen=True)
class Push:
    repository: tyro.conf.Positional[str]
    """The repository user/name, which is created if it does not exist."""
    workdir: Path
    """The run's folder."""
    private: bool = False
    """Create a private repository."""
    license: str | None = None
    """The licence of the weights, such as mit or cc-by-4.0. Default: none is stated."""
    report: Path | None = None
    """The evaluation report for the card. Default: evaluation.json in the run's folder."""
    discriminator: bool = False
    """Also upload the discriminator, for further training."""
    reconstructions: bool = False
    """Also upload the figure of validation images and their reconstructions."""


def main() -> None:
    args = parse(Push, __doc__)
    from taming_jax.sharing import push

    settings = {k: x for k, x in vars(args).items() if k not in ("repository", "workdir")}
    address = push(args.workdir, args.repository, **settings)
    print(f"{args.workdir} is at {address}.")
