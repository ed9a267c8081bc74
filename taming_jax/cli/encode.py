"""Writes a split of a run's dataset as codes.

    taming-jax encode --workdir runs/mnist --split test --out codes.npz

The file holds `codes` [n,h',w'] in raster order and `labels` int32 [n]. To encode other images, use
`taming_jax.load_run(...).encode`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.cli.arguments import DataFlags, check_output, data_settings, parse
from taming_jax.errors import RunFailed
from taming_jax.storage import atomic_file


@dataclass(frozen=True)
class Encode:
    workdir: Path
    """The run's folder."""
    out: Path
    """FILE.npz."""
    split: str = "train"
    """train, validation or test."""
    data: DataFlags = field(default_factory=DataFlags)


def main() -> None:
    given: Any = parse(Encode, __doc__)
    check_output("--out", given.out, [".npz"])
    from taming_jax.run import load_run

    run = load_run(given.workdir, data_settings(given.data))
    split, size = run.tokens(given.split), run.config.grid_size
    codes = split.images.reshape(-1, size, size)
    try:
        with atomic_file(given.out) as partial, partial.open("wb") as file:
            np.savez_compressed(file, codes=codes, labels=split.labels.astype(np.int32))
    except OSError as error:
        raise RunFailed(f"{given.out} could not be written: {error.strerror or error}.") from error
    print(f"{len(codes)} images as {size}x{size} codes are in {given.out}.")
