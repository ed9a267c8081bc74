"""Describes a dataset: sizes, channel statistics, classes, duplicates, and a contact sheet.

    taming-jax dataset --config birds --data.path FOLDER --out sheet.png

Accepts the settings of the training scripts, but only the data settings have an effect.
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


def describe_split(name: str, split: Split, class_names: tuple[str, ...]) -> str:
    """Returns a line with the size of a split and its statistics per channel."""
    n, h, w, c = split.images.shape
    means, squares = np.zeros(c), np.zeros(c)
    for start in range(0, n, 1024):  # in chunks, because a split may be larger than memory
        chunk = split.images[start : start + 1024].astype(np.float64)
        means += chunk.mean((1, 2)).sum(0) / n
        squares += np.square(chunk).mean((1, 2)).sum(0) / n
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    channels = ", ".join(f"{m:.1f} ± {d:.1f}" for m, d in zip(means, deviations, strict=True))
    return (
        f"{name}: {n} images of {h}x{w}x{c}, mean and standard deviation per channel {channels}; "
        f"{len(np.unique(split.labels))} of {len(class_names)} classes"
    )


def hash_images(split: Split) -> set[bytes]:
    """Returns the hashes of a split's images, without duplicates."""
    return {hashlib.sha256(image.tobytes()).digest() for image in split.images}


@dataclass(frozen=True)
class Dataset(Training):
    out: Path | None = None
    """The FILE.png for a contact sheet of training images."""


def main() -> None:
    args = parse_training(Dataset, sys.argv[1:], description=__doc__)
    config = args.config
    if args.out is not None:
        check_output("--out", args.out, [".png"])
    # Without random crops, all splits have the same image size, so duplicates are equal arrays.
    splits: Splits = datasets.load(dataclasses.replace(config.data, random_crop=False))
    by_name = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    for name, split in by_name.items():
        print(describe_split(name, split, splits.class_names))
    print(f"{'class':<40}" + "".join(f"{name:>12}" for name in by_name))
    counts = [
        np.bincount(split.labels, minlength=len(splits.class_names)) for split in by_name.values()
    ]
    for name, *class_counts in zip(splits.class_names, *counts, strict=True):
        print(f"{name:<40}" + "".join(f"{count:>12}" for count in class_counts))
    hashes = {name: hash_images(split) for name, split in by_name.items()}
    for name, split in by_name.items():
        print(f"{len(split.images) - len(hashes[name])} duplicates within {name}")
    for one, other in itertools.combinations(by_name, 2):
        print(f"{len(hashes[one] & hashes[other])} images of {other} are also in {one}")
    if args.out is not None:
        from taming_jax.figures import draw_grid, save

        images = splits.train.images
        title = f"{config.data.path or config.data.name}: {len(images)} training images"
        save(draw_grid(images[datasets.evenly_spaced(len(images), 64)], (), 8, title), args.out)
        print(f"Wrote a contact sheet to {args.out}.")
