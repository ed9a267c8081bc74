"""The report of a run: how good it is, and against what that was measured."""

from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.evaluation.measurements import nearest, reconstructions, samples
from taming_jax.evaluation.protocol import Protocol
from taming_jax.files import text_hash
from taming_jax.run import Run
from taming_jax.weights.arrays import hash_arrays

SCHEMA = 1  # of the report


def evaluate(
    run: Run, *, devices: int | None = None, progress: bool = False, **protocol: Any
) -> dict[str, Any]:
    """Returns the report that docs/evaluation.md describes: on reconstructions of a split's images
    and, if the run has a prior, on samples. `protocol` holds the settings of `Protocol`, such as
    `split="test", samples=5000`."""
    return finished(Evaluator(run, Protocol(**protocol), devices, progress))


def finished(evaluation: Evaluator) -> dict[str, Any]:
    """Returns the report: `features`, `reconstruction`, `samples` (None without a prior),
    `protocol` and `warnings`."""
    return {
        "schema": SCHEMA,
        "features": evaluation.extractor.distance,
        "reconstruction": reconstructions(evaluation),
        "samples": samples(evaluation) if evaluation.draws else None,
        "protocol": described(evaluation),
        "warnings": evaluation.warnings + small_counts(evaluation),
    }


def draw(evaluation: Evaluator, folder: Path, report: dict[str, Any]) -> None:
    """Writes the figures of a report: how often each code is used, and the training images nearest
    to some samples. Raises OSError."""
    from taming_jax import figures

    protocol = evaluation.protocol
    counts = np.array(report["reconstruction"]["code_counts"])
    of = f"the {protocol.split} split"
    figures.codebook_usage(counts, folder / "evaluation_codes.png", of)
    if report["samples"] is not None:
        images, closest, distances = nearest(evaluation, 8)
        compared = min(len(evaluation.splits.train.images), protocol.kept)
        title = (
            f"Samples, the nearest of {compared} training images by {evaluation.extractor.name} "
            "features, and their distance (1: as between training images)"
        )
        figure = figures.labelled_grid(
            np.concatenate([images, closest]), ("sample", "training image"), len(images),
            title, [f"{distance:.2f}" for distance in distances],
        )  # fmt: skip
        figures.save(figure, folder / "evaluation_nearest.png")


def described(evaluation: Evaluator) -> dict[str, Any]:
    """The protocol as the report has it: what was measured, against what, and how."""
    run, protocol, config = evaluation.run, evaluation.protocol, evaluation.run.config
    draws, classifier = evaluation.draws, evaluation.classifier
    moments = evaluation.file_moments
    return {
        "run": str(run.workdir),
        "config": config.config,
        "vqgan_step": run.step if run.transformer is None else None,
        "prior_step": None if run.transformer is None else run.step,
        "generator": hash_arrays(run.params),
        "dataset": config.data.name,
        "dataset_hash": text_hash(evaluation.identity)[:16],
        "split": protocol.split,
        "images": len(evaluation.chosen),
        "images_hash": evaluation.chosen.hash(),
        "reference_file": None if protocol.reference is None else str(protocol.reference),
        "reference": moments and hash_arrays((np.asarray(moments.mean), moments.covariance)),
        "size": config.data.image_size,
        "crop": "squeezed" if config.data.squeeze else "centre",
        "features": evaluation.extractor.name,
        "weights": evaluation.extractor.weights,
        "resize": evaluation.extractor.resize,
        "classifier": None if classifier is None else classifier.extractor.weights,
        "kept": protocol.kept,
        "neighbours": protocol.neighbours,
        "samples": protocol.samples if draws else 0,
        "classes": "as often as the split has them",
        "seed": protocol.seed,
        **(run.sampling(**protocol.sampling)._asdict() if draws else {}),
    }


def small_counts(evaluation: Evaluator) -> list[str]:
    """Warnings of sets that are too small for the features."""
    extractor = evaluation.extractor
    counts = {"images of the split": len(evaluation.chosen)}
    if evaluation.draws:
        counts["samples"] = evaluation.protocol.samples
    return [
        f"{count} {name} are not more than the {extractor.dimensions} dimensions of "
        f"{extractor.name}: covariances are singular, and the Fréchet distance is biased upwards."
        for name, count in counts.items()
        if count <= extractor.dimensions
    ]
