"""The report of a run: its metrics, and the protocol that they were measured with."""

from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.evaluation.measurements import (
    evaluate_reconstructions,
    evaluate_samples,
    find_nearest,
)
from taming_jax.evaluation.protocol import Protocol
from taming_jax.run import Run
from taming_jax.storage import hash_json
from taming_jax.weights.arrays import hash_arrays

SCHEMA = 1  # the report's version


def evaluate(
    run: Run, *, devices: int | None = None, progress: bool = False, **protocol: Any
) -> dict[str, Any]:
    """Evaluates the reconstructions of a split and, if the run has a prior, samples. Returns the
    report that docs/evaluation.md describes. `protocol` are the settings of `Protocol`, such as
    `split="test", samples=5000`. Raises the errors of `Protocol` and `Evaluator`."""
    return build_report(Evaluator(run, Protocol(**protocol), devices, progress))


def build_report(evaluator: Evaluator) -> dict[str, Any]:
    """Returns the report: `schema`, `features`, `reconstruction`, `samples` (or None), `protocol`
    and `warnings`."""
    return {
        "schema": SCHEMA,
        "features": evaluator.extractor.distance,
        "reconstruction": evaluate_reconstructions(evaluator),
        "samples": evaluate_samples(evaluator) if evaluator.has_samples else None,
        "protocol": describe_protocol(evaluator),
        "warnings": evaluator.warnings + describe_small_sets(evaluator),
    }


def save_figures(evaluator: Evaluator, folder: Path, report: dict[str, Any]) -> None:
    """Writes the figures of a report: the usage of each code, and samples with their nearest
    training images. Raises OSError if a file cannot be written."""
    from taming_jax import figures

    protocol = evaluator.protocol
    counts = np.array(report["reconstruction"]["code_counts"])
    split = f"the {protocol.split} split"
    figures.plot_codebook_usage(counts, folder / "evaluation_codes.png", split)
    if report["samples"] is not None:
        images, neighbors, distances = find_nearest(evaluator, 8)
        compared = min(len(evaluator.splits.train.images), protocol.kept)
        title = (
            f"Samples, and the nearest of {compared} training images by {evaluator.extractor.name} "
            "features. Below: their distance (1: the median distance from a training image to its "
            "nearest neighbor)"
        )
        figure = figures.draw_grid(
            np.concatenate([images, neighbors]), ("sample", "training image"), len(images),
            title, [f"{distance:.2f}" for distance in distances],
        )  # fmt: skip
        figures.save(figure, folder / "evaluation_nearest.png")


def describe_protocol(evaluator: Evaluator) -> dict[str, Any]:
    """Returns the report's protocol: what was measured, how, and what it was compared with."""
    run, protocol, config = evaluator.run, evaluator.protocol, evaluator.run.config
    has_samples, classifier = evaluator.has_samples, evaluator.classifier
    moments = evaluator.file_moments
    return {
        "run": str(run.workdir),
        "config": config.config,
        "vqgan_step": run.step if run.transformer is None else None,
        "prior_step": None if run.transformer is None else run.step,
        "generator": hash_arrays(run.params),
        "hash": run.hash_weights(),
        "dataset": config.data.name,
        "dataset_hash": hash_json(evaluator.fingerprint)[:16],
        "split": protocol.split,
        "images": len(evaluator.images),
        "images_hash": evaluator.images.hash(),
        "reference_file": None if protocol.reference is None else str(protocol.reference),
        "reference": moments and hash_arrays((np.asarray(moments.mean), moments.covariance)),
        "size": config.data.image_size,
        "crop": "squeezed" if config.data.resize_mode == "squeeze" else "centre",
        "features": evaluator.extractor.name,
        "weights": evaluator.extractor.weights,
        "resize": evaluator.extractor.resize,
        "classifier": None if classifier is None else classifier.extractor.weights,
        "kept": protocol.kept,
        "neighbours": protocol.neighbours,
        "samples": protocol.samples if has_samples else 0,
        "classes": "as frequent as in the split",
        "seed": protocol.seed,
        **(run.sampler.resolve_settings(**protocol.sampling) if has_samples else {}),
    }


def describe_small_sets(evaluator: Evaluator) -> list[str]:
    """Returns warnings about sets that are too small for the dimension of the features."""
    extractor = evaluator.extractor
    counts = {"images of the split": len(evaluator.images)}
    if evaluator.has_samples:
        counts["samples"] = evaluator.protocol.samples
    return [
        f"{count} {name} are too few for the {extractor.dimensions} dimensions of "
        f"{extractor.name}: the covariance is singular, and the Fréchet distance is biased upward."
        for name, count in counts.items()
        if count <= extractor.dimensions
    ]
