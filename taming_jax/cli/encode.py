"""Writes a split of a run's dataset as codes.

    taming-jax encode --workdir runs/mnist --split test --out codes.npz

The file holds `codes` [n,h',w'] in raster order and `labels` int32 [n]. To encode other images, use
`taming_jax.load_run(...).encode`.
"""

import argparse
from pathlib import Path

import numpy as np

from taming_jax.cli.arguments import add_data_flags, data_settings
from taming_jax.errors import RunFailed, UserError
from taming_jax.files import check_writable, whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the run's folder")
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument("--out", type=Path, required=True, help="FILE.npz")
    add_data_flags(parser)
    given = parser.parse_args()
    if given.out.suffix != ".npz":
        raise UserError(f"--out {given.out}: name a .npz.")
    if not given.out.absolute().parent.is_dir():
        folder = given.out.absolute().parent
        raise UserError(f"--out {given.out}: the folder {folder} does not exist; make it.")
    check_writable("--out", given.out)
    from taming_jax.run import load_run

    run = load_run(given.workdir, data_settings(given))
    split, size = run.tokens(given.split), run.config.grid_size
    codes = split.images.reshape(-1, size, size)
    try:
        with whole(given.out) as partial, partial.open("wb") as file:
            np.savez_compressed(file, codes=codes, labels=split.labels.astype(np.int32))
    except OSError as error:
        raise RunFailed(f"{given.out} could not be written: {error.strerror or error}.") from error
    print(f"{len(codes)} images as {size}x{size} codes are in {given.out}.")
