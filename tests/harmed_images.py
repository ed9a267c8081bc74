#!/usr/bin/env python3
"""What the distances say of real images, of blurred ones, and of noise, against real ones.

    python tests/harmed_images.py --out docs/distances.png --photographs FOLDER

A distance is worth something where halves of one set are near, and blur and noise are ever farther.
FOLDER holds parquet files, or pictures; MNIST comes with the package.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from taming_jax.config.load import load_config  # noqa: E402
from taming_jax.data import datasets  # noqa: E402
from taming_jax.figures import ACCENT, INK, save  # noqa: E402
from taming_jax.metrics import distances  # noqa: E402
from taming_jax.metrics.features import Features, load_vgg  # noqa: E402
from taming_jax.parallel.devices import Devices  # noqa: E402

BLURS = (0.5, 0.75, 1.0, 1.5, 2.0)  # deviations of the Gaussian, in pixels of 28 a side


def measured(images: np.ndarray, features: Features) -> dict[str, dict[str, float]]:
    """Every distance of the first half of images uint8 [n,h,w,c] to the second half as it is, at
    each blur, and to noise of their mean and deviation, by name."""
    order = np.random.default_rng(0).permutation(len(images))
    real, other = np.array_split(images[order], 2)
    noise = np.random.default_rng(1).normal(images.mean(), images.std(), other.shape)
    sets = {"real": other}
    for blur in BLURS:
        pixels = blur * images.shape[1] / 28
        sets[f"blur {blur:g}"] = ndimage.gaussian_filter(other, (0, pixels, pixels, 0))
    sets["noise"] = np.clip(noise, 0, 255).astype(np.uint8)
    reference = features(real)[0]
    known, found = distances.compute_moments(reference), {}
    for name, each in sets.items():
        seen = features(each)[0]
        manifold = distances.compute_prdc(reference, seen)
        found[name] = {
            "FD": distances.frechet_distance(known, distances.compute_moments(seen)),
            "KD": distances.kernel_distance(reference, seen)[0],
            **{f"1 - {name}": 1 - value for name, value in manifold.items()},
        }
    return found


def drawn(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """A row a dataset, a panel a distance."""
    terms = list(next(iter(found.values()))["real"])
    figure = Figure(figsize=(2.6 * len(terms), 2.6 * len(found) + 0.4), layout="constrained")
    for row, (dataset, of) in enumerate(found.items()):
        for column, term in enumerate(terms):
            axes = figure.add_subplot(len(found), len(terms), row * len(terms) + column + 1)
            names = list(of)
            colours = [ACCENT if name == "noise" else INK for name in names]
            axes.bar(range(len(names)), [of[name][term] for name in names], color=colours)
            axes.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
            axes.set_title(f"{term}, {dataset}", loc="left", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photographs", help="a folder of parquet files, or of pictures")
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    features = Features(load_vgg(), Devices())
    chosen: dict[str, dict[str, Any]] = {"MNIST": {}}
    if given.photographs:
        parquet = any(Path(given.photographs).glob("*.parquet"))
        chosen["photographs"] = {
            "data.name": load_config("birds").data.name if parquet else "folder",
            "data.path": given.photographs, "data.image_size": 64, "data.channels": 3,
        }  # fmt: skip
    found = {}
    for name, settings in chosen.items():
        images = datasets.load(load_config("mnist_tiny", settings).data).train.images
        images = images[datasets.evenly_spaced(len(images), given.images)]
        found[name] = measured(images, features)
        for what, terms in found[name].items():
            said = "  ".join(f"{term} {value:.4g}" for term, value in terms.items())
            print(f"{name:<12} {what:<10} {said}", flush=True)
    drawn(found, given.out)


if __name__ == "__main__":
    main()
