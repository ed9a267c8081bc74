"""Encodes a split of a run's dataset, and writes the codes to a file.

    taming-jax encode --workdir runs/mnist --split test --out codes.npz

The file holds `codes` unsigned [n,h',w'] and `labels` int32 [n]. To encode other images, use
`taming_jax.load_run(...).encode`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.cli.arguments import DataFlags, check_output, collect_data_settings, parse
from taming_jax.errors import RunFailed
from taming_jax.storage import atomic_file


@dataclass(frozen=True)
class Encode:
    workdir: Path
    """The run's folder."""
    out: Path
    """The FILE.npz to write."""
    split: str = "train"
    """The split: train, validation or test."""
    data: DataFlags = field(default_factory=DataFlags)


def main() -> None:
    args: Any = parse(Encode, __doc__)
    check_output("--out", args.out, [".npz"])
    from taming_jax.run import load_run

    run = load_run(args.workdir, collect_data_settings(args.data))
    split, size = run.tokens(args.split), run.config.grid_size
    codes = split.images.reshape(-1, size, size)
    try:
        with atomic_file(args.out) as partial, partial.open("wb") as file:
            np.savez_compressed(file, codes=codes, labels=split.labels.astype(np.int32))
    except OSError as error:
        raise RunFailed(f"{args.out} could not be written: {error.strerror or error}.") from error
    print(f"Wrote the {size}x{size} codes of {len(codes)} images to {args.out}.")
