"""What a dataset holds: sizes, classes, means, duplicates, and a sheet of its pictures.

    taming-jax dataset --config birds --data.path FOLDER --out sheet.png

Takes the settings of the training scripts, of which only those of the data matter.
"""

import dataclasses
import hashlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taming_jax.cli.arguments import Training, check_output, parse_training
from taming_jax.data import datasets
from taming_jax.data.datasets import Split, Splits


def describe(name: str, split: Split, class_names: tuple[str, ...]) -> str:
    n, h, w, c = split.images.shape
    means, squares = np.zeros(c), np.zeros(c)
    for start in range(0, n, 1024):  # in parts, since a split may be larger than memory
        part = split.images[start : start + 1024].astype(np.float64)
        means += part.mean((1, 2)).sum(0) / n
        squares += np.square(part).mean((1, 2)).sum(0) / n
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    of_channels = ", ".join(f"{m:.1f} ± {d:.1f}" for m, d in zip(means, deviations, strict=True))
    return (
        f"{name}: {n} images of {h}x{w}x{c}, mean and deviation of each channel {of_channels}; "
        f"{len(np.unique(split.labels))} of {len(class_names)} classes"
    )


def hashes(split: Split) -> set[bytes]:
    return {hashlib.sha256(image.tobytes()).digest() for image in split.images}


@dataclass(frozen=True)
class Dataset(Training):
    out: Path | None = None
    """A sheet of training images, .png."""


def main() -> None:
    given = parse_training(Dataset, sys.argv[1:], description=__doc__)
    config = given.config
    if given.out is not None:
        check_output("--out", given.out, [".png"])
    # All splits at one size, so that the same picture is the same array in each.
    splits: Splits = datasets.load(dataclasses.replace(config.data, random_crop=False))
    named = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    for name, split in named.items():
        print(describe(name, split, splits.class_names))
    print(f"{'class':<40}" + "".join(f"{name:>12}" for name in named))
    counts = [
        np.bincount(split.labels, minlength=len(splits.class_names)) for split in named.values()
    ]
    for name, *of_splits in zip(splits.class_names, *counts, strict=True):
        print(f"{name:<40}" + "".join(f"{count:>12}" for count in of_splits))
    seen = {name: hashes(split) for name, split in named.items()}
    for name, split in named.items():
        print(f"{len(split.images) - len(seen[name])} duplicates within {name}")
    for one, other in itertools.combinations(named, 2):
        print(f"{len(seen[one] & seen[other])} images of {other} are in {one} as well")
    if given.out is not None:
        from taming_jax.figures import draw_grid, save

        images = splits.train.images
        title = f"{config.data.path or config.data.name}: {len(images)} training images"
        save(draw_grid(images[datasets.evenly_spaced(len(images), 64)], (), 8, title), given.out)
        print(f"A sheet of them is in {given.out}.")
