"""Makes a run from a repository on the Hugging Face hub, or from a folder with its files.

    taming-jax pull user/mnist --workdir runs/mnist
    taming-jax pull user/mnist@v1 --workdir runs/mnist

The result is an ordinary run: sample from it, evaluate it, or continue training. To only load a
model, use `taming_jax.load_run("hf://user/mnist")`.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from taming_jax.cli.arguments import parse


@dataclass(frozen=True)
class Pull:
    source: tyro.conf.Positional[str]
    """The repository user/name, optionally followed by @ and a revision, or a folder."""
    workdir: Path
    """The new run's folder."""


def main() -> None:
    args = parse(Pull, __doc__)
    from taming_jax.sharing import pull

    pull(args.source, args.workdir)
    print(f"The run from {args.source} is now in {args.workdir}.")
