"""What a run is worth, as numbers, and against what exactly."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.errors import UserError
from taming_jax.evaluation.reconstructions import reconstructions
from taming_jax.evaluation.samples import nearest, samples
from taming_jax.evaluation.subject import Evaluation, Protocol
from taming_jax.files import text_hash
from taming_jax.metrics.features import hash_of
from taming_jax.parallel import distributed
from taming_jax.run import Run
from taming_jax.training.checkpoints import Store

SCHEMA = 1  # of the report


def evaluate(
    run: Run,
    *,
    devices: int | None = None,
    progress: bool = False,
    sweep: Sequence[float | tuple[float, float]] = (),
    data: Mapping[str, Any] | None = None,
    **protocol: Any,
) -> dict[str, Any]:
    """The report of docs/evaluation.md: reconstructions of a split's images, and new images where
    the run has a prior. `protocol` are the settings of `Protocol` (`split="test", samples=5000`,
    …); `data` is as in `load_run`; `sweep` holds guidance scales to measure samples at as well."""
    run = run.with_data(data) if data else run
    return finished(Evaluation(run, Protocol(**protocol), devices, progress, sweep))


def finished(evaluation: Evaluation) -> dict[str, Any]:
    """The whole report: `features`, `reconstruction`, `samples` (None without a prior), `protocol`,
    `warnings`, and under `sweep` the samples of each guidance scale."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "features": evaluation.extractor.distance,
        "reconstruction": reconstructions(evaluation),
        "samples": None,
    }
    if evaluation.draws:
        report["samples"] = samples(evaluation)
        if evaluation.sweep:
            report["sweep"] = [
                changed | samples(evaluation, **changed) for changed in evaluation.sweep
            ]
    return report | {"protocol": described(evaluation), "warnings": warned(evaluation)}


def draw(evaluation: Evaluation, folder: Path, report: dict[str, Any]) -> None:
    """The figures of a report: how often each code is used; of samples, the training images
    that are nearest to them; and of a sweep, its curves. Raises OSError."""
    from taming_jax import figures

    # All processes compute them, the first one writes.
    drawing = [
        functools.partial(
            figures.codebook_usage, np.array(report["reconstruction"]["code_counts"]),
            folder / "evaluation_codes.png", f"the {evaluation.protocol.split} split",
        )
    ]  # fmt: skip
    if report["samples"] is not None:
        images, closest, far = nearest(evaluation, 8)
        train, name = len(evaluation.splits.train.images), evaluation.extractor.name
        of = f"the nearest of {min(train, evaluation.protocol.kept)} of {train} training images"
        drawing.append(
            functools.partial(
                figures.nearest_images, images, closest, far, f"{of}, by {name}'s features",
                folder / "evaluation_nearest.png",
            )
        )  # fmt: skip
    if "sweep" in report:
        file = folder / "evaluation_sweep.png"
        drawing.append(functools.partial(figures.sweep, report["sweep"], report["features"], file))
    for each in drawing:
        distributed.from_first(each)


def described(evaluation: Evaluation) -> dict[str, Any]:
    """The protocol as the report has it: what was measured, against what, and how."""
    run, protocol, config = evaluation.run, evaluation.protocol, evaluation.run.config
    draws, classifier = evaluation.draws, evaluation.classifier
    return {
        "run": str(run.workdir),
        "config": config.config,
        "vqgan_step": stage1_step(run),
        "prior_step": None if run.transformer is None else run.step,
        "generator": hash_of(jax.tree.map(np.asarray, run.params)),
        "dataset": config.data.name,
        "dataset_hash": text_hash(evaluation.identity)[:16],
        "split": protocol.split,
        "images": len(evaluation.chosen),
        "images_hash": evaluation.chosen.hash,
        "reference_file": None if protocol.reference is None else str(protocol.reference),
        "reference": evaluation.reference_hash,
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
        **(evaluation.sampling(protocol) if draws else {}),
    }


def warned(evaluation: Evaluation) -> list[str]:
    """What has to be known beside the figures."""
    found, d = list(evaluation.warnings), evaluation.extractor.dimensions
    counts = {"images of the split": len(evaluation.chosen)}
    if evaluation.draws:
        counts["samples"] = evaluation.protocol.samples
    for name, count in counts.items():
        if count <= d:
            found.append(
                f"{count} {name} are not more than the {d} dimensions of "
                f"{evaluation.extractor.name}: covariances are singular, and the Fréchet distance "
                "is biased upwards."
            )
    return found


def stage1_step(run: Run) -> int | None:
    """The step of stage 1's best checkpoint, where that is the generator of this run."""
    if run.transformer is None:
        return run.step
    with contextlib.suppress(UserError):
        checkpoint = Store(run.workdir, "vqgan").chosen()
        if hash_of(checkpoint.generator) == hash_of(jax.tree.map(np.asarray, run.params)):
            return checkpoint.step
    return None
