#!/usr/bin/env python3
"""Draws new images of classes from a run of both stages.

    python scripts/sample.py --workdir runs/mnist --classes 0 1 2 --per-class 8 --out grid.png

`--out` says what is written: FILE.npz (`images` uint8 [n,h,w,c], `labels` int32 [n]), FILE.png (a
labelled grid, a row a class), or a folder (one PNG an image). Images are drawn as the run's preset
says, unless told otherwise.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from taming_jax.command_line import add_flags, processes
from taming_jax.errors import RunFailed, UserError, report
from taming_jax.files import check_writable

ROWS = 10  # of a grid, unless its classes are named


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the run's folder")
    parser.add_argument(
        "--classes",
        nargs="+",
        help=f"numbers or names; all unless told, but for a grid, of {ROWS} of them",
    )
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument(
        "--guidance-scale",
        type=float,
        nargs="+",
        help="1 is none; 2 is much; two numbers are the first code's and the last's",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, help="all unless told")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="images in flight, which bounds memory; the images do not depend on it",
    )
    parser.add_argument("--out", required=True)
    add_flags(parser)
    return parser.parse_args()


def write_folder(out: Path, images: np.ndarray, labels: np.ndarray, per_class: int) -> None:
    """One PNG an image, named by its class and its place in it."""
    from PIL import Image

    out.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        place = out / f"{labels[i]:04d}_{i % per_class:05d}.png"
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(place)


def main() -> None:
    given = parse()
    from taming_jax.train.hosts import watched

    watched(functools.partial(work, given), processes(given))


# What may differ from process to process.
OWN = {"process_id", "workdir", "out"}


def work(given: argparse.Namespace) -> None:
    from taming_jax.train import hosts

    hosts.one_speaks()
    hosts.check_same_flags({name: x for name, x in vars(given).items() if name not in OWN})
    out, kind = hosts.from_first(lambda: place_of(given))
    from taming_jax.data.sources import spread
    from taming_jax.figures import to_uint8
    from taming_jax.run import load_run

    run = load_run(given.workdir)
    known = len(run.class_names)
    unless_told = spread(known, ROWS if kind == ".png" else known)
    asked = run.labels(given.classes or unless_told)
    classes = np.array(list(dict.fromkeys(asked.tolist())), np.int32)  # each once
    images = to_uint8(
        run.sample(
            classes.tolist(), given.per_class, temperature=given.temperature, top_k=given.top_k,
            top_p=given.top_p, guidance_scale=given.guidance_scale, seed=given.seed,
            devices=given.devices, batch_size=given.batch_size, progress=True,
        )
    )  # fmt: skip
    names = [run.class_names[i] for i in classes]
    # The others wait: one that was long alone would be taken for lost.
    hosts.from_first(lambda: write(out, kind, images, classes, names, given.per_class))
    print(f"{len(images)} images of {len(classes)} classes are in {out}.")
    if given.classes is None and len(classes) < known:
        print(f"There are {known} classes; --classes names others.")


def place_of(given: argparse.Namespace) -> tuple[Path, str]:
    """Where the images go, and the ending that says how: .npz, .png, or none for a folder.
    UserError where they cannot."""
    out = Path(given.out)
    kind = "" if out.is_dir() else out.suffix
    if kind not in ("", ".npz", ".png"):
        raise UserError(f"--out {out}: name a .npz, a .png, or a folder.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.absolute().parent} does not exist; make it.")
    if not kind and out.is_file():
        raise UserError(f"--out {out} is a file; name a folder, a .npz or a .png.")
    if given.per_class < 1:
        raise UserError(f"--per-class is {given.per_class}; it must be 1 or more.")
    if given.batch_size is not None and given.batch_size < 1:
        raise UserError(f"--batch-size is {given.batch_size}; it must be 1 or more.")
    check_writable("--out", out)
    return out, kind


def write(
    out: Path, kind: str, images: np.ndarray, classes: np.ndarray, names: list[str], per_class: int
) -> None:
    """Writes uint8 images [n,h,w,c], `per_class` of each class, in their order."""
    from taming_jax.figures import labelled_grid, save

    labels = np.repeat(classes, per_class)
    try:
        if kind == ".npz":
            np.savez_compressed(out, images=images, labels=labels)
        elif kind == ".png":
            save(labelled_grid(images, names, per_class), out)
        else:
            write_folder(out, images, labels, per_class)
    except OSError as error:
        raise RunFailed(f"{out} could not be written: {error.strerror or error}.") from error


if __name__ == "__main__":
    sys.exit(report(main))
