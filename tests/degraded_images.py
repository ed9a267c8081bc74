#!/usr/bin/env python3
"""Compares the distances of real images, blurred images, and noise to real images.

    python tests/degraded_images.py --out docs/distances.png --photographs FOLDER

A useful distance is small between two halves of the same dataset, and grows with blur and noise.
FOLDER contains parquet files or pictures. MNIST comes with the package.
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

# Standard deviations of the Gaussian, in pixels of a 28x28 image.
BLURS = (0.5, 0.75, 1.0, 1.5, 2.0)


def measure_distances(images: np.ndarray, features: Features) -> dict[str, dict[str, float]]:
    """Returns the distances of the first half of images uint8 [n,h,w,c] to the second half, to the
    second half at each blur, and to noise with the same mean and standard deviation. The keys are
    the name of the set and the name of the distance."""
    order = np.random.default_rng(0).permutation(len(images))
    real, other = np.array_split(images[order], 2)
    noise = np.random.default_rng(1).normal(images.mean(), images.std(), other.shape)
    sets = {"real": other}
    for blur in BLURS:
        pixels = blur * images.shape[1] / 28
        sets[f"blur {blur:g}"] = ndimage.gaussian_filter(other, (0, pixels, pixels, 0))
    sets["noise"] = np.clip(noise, 0, 255).astype(np.uint8)
    reference = features(real)[0]
    reference_moments, results = distances.compute_moments(reference), {}
    for name, set_images in sets.items():
        set_features = features(set_images)[0]
        manifold = distances.compute_prdc(reference, set_features)
        results[name] = {
            "FD": distances.frechet_distance(
                reference_moments, distances.compute_moments(set_features)
            ),
            "KD": distances.kernel_distance(reference, set_features)[0],
            **{f"1 - {term}": 1 - value for term, value in manifold.items()},
        }
    return results


def draw_figure(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draws a figure with one row per dataset and one panel per distance."""
    terms = list(next(iter(results.values()))["real"])
    figure = Figure(figsize=(2.6 * len(terms), 2.6 * len(results) + 0.4), layout="constrained")
    for row, (dataset, values) in enumerate(results.items()):
        for column, term in enumerate(terms):
            axes = figure.add_subplot(len(results), len(terms), row * len(terms) + column + 1)
            names = list(values)
            colors = [ACCENT if name == "noise" else INK for name in names]
            axes.bar(range(len(names)), [values[name][term] for name in names], color=colors)
            axes.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
            axes.set_title(f"{term}, {dataset}", loc="left", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photographs", help="a folder of parquet files or pictures")
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    features = Features(load_vgg(), Devices())
    datasets_settings: dict[str, dict[str, Any]] = {"MNIST": {}}
    if args.photographs:
        parquet = any(Path(args.photographs).glob("*.parquet"))
        datasets_settings["photographs"] = {
            "data.name": load_config("birds").data.name if parquet else "folder",
            "data.path": args.photographs, "data.image_size": 64, "data.channels": 3,
        }  # fmt: skip
    results = {}
    for name, settings in datasets_settings.items():
        images = datasets.load(load_config("mnist_tiny", settings).data).train.images
        images = images[datasets.evenly_spaced(len(images), args.images)]
        results[name] = measure_distances(images, features)
        for set_name, terms in results[name].items():
            columns = "  ".join(f"{term} {value:.4g}" for term, value in terms.items())
            print(f"{name:<12} {set_name:<10} {columns}", flush=True)
    draw_figure(results, args.out)


if __name__ == "__main__":
    main()
