"""The figures of new images."""

import dataclasses
from typing import Any

import numpy as np

from taming_jax.data.datasets import spread
from taming_jax.evaluation.subject import Evaluation, Protocol
from taming_jax.figures import to_uint8
from taming_jax.metrics import distances
from taming_jax.metrics.distances import Collected, Collector


def samples(evaluation: Evaluation, **changed: Any) -> dict[str, Any]:
    """The figures of new images, by the protocol, or by what of its sampling is `changed`."""
    protocol = dataclasses.replace(evaluation.protocol, **changed)
    reference, classifier = evaluation.reference, evaluation.classifier
    order = np.sort(evaluation.chosen.labels, kind="stable")
    labels = order[evenly(len(order), protocol.samples)].astype(np.int32)
    firsts = np.searchsorted(labels, labels)
    numbers = (np.arange(len(labels)) - firsts).astype(np.int32)
    collector = Collector(len(labels), protocol.kept)
    probabilities, right = [], np.zeros(len(labels), bool)
    done = 0
    for part in evaluation.drawn(protocol, labels, numbers):
        images = to_uint8(part)
        features, classes = evaluation.features(images)
        collector.add(features)
        if evaluation.extractor.name == "InceptionV3":
            probabilities.append(classes)
        if classifier is not None:
            own = classes if classifier is evaluation.features else classifier(images)[1]
            right[done : done + len(part)] = own.argmax(1) == labels[done : done + len(part)]
        done += len(part)
    found = collector.collected()
    moments = evaluation.reference_moments
    with evaluation.phase("Fréchet distance of samples"):
        fd = distances.frechet_distance(found.moments, moments)
    with evaluation.phase("kernel distance, precision and recall of samples"):
        apart = compared(protocol, reference.features, found.features)
    report: dict[str, Any] = {"fd": fd} | apart
    if probabilities:
        score = distances.inception_score(np.concatenate(probabilities), seed=protocol.seed)
        report |= dict(zip(("inception_score", "inception_score_deviation"), score, strict=True))
    if classifier is not None:
        report["accuracy"] = float(right.mean())
    with evaluation.phase("distances of each class"):
        report["per_class"] = per_class(evaluation, labels, right, found)
    return report


def compared(protocol: Protocol, real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """What is taken from the features themselves, where there are enough of them."""
    if min(len(real), len(fake)) <= protocol.neighbours:
        return {}
    kd, deviation = distances.kernel_distance(fake, real, protocol.seed)
    shares = distances.manifold(real, fake, protocol.neighbours)
    return {"kd": kd, "kd_deviation": deviation} | shares


def per_class(
    evaluation: Evaluation, labels: np.ndarray, right: np.ndarray, found: Collected
) -> dict[str, dict[str, Any]]:
    """The same of each class that was drawn; `fd` where there are more images of it than
    features have dimensions."""
    reference, report = evaluation.reference, {}
    for number in np.unique(labels):
        own: dict[str, Any] = {"samples": int((labels == number).sum())}
        if evaluation.classifier is not None:
            own["accuracy"] = float(right[labels == number].mean())
        fake = found.features[labels[found.rows] == number]
        real = reference.features[evaluation.chosen.labels[reference.rows] == number]
        if min(len(fake), len(real)) > evaluation.extractor.dimensions:
            own["fd"] = distances.frechet_distance(distances.moments(fake), distances.moments(real))
        own |= compared(evaluation.protocol, real, fake)
        report[evaluation.splits.class_names[number]] = own
    return report


def nearest(evaluation: Evaluation, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """So many samples uint8 [n,h,w,c], which of the training images (of at most `kept` of them)
    are nearest to them by their features, and how far these are, in units of what a training
    image is from its nearest."""
    train = evaluation.choice("train", evaluation.protocol.kept)
    known = evaluation.collected(train, "training images")
    classes = spread(len(evaluation.splits.class_names), count)
    labels = np.resize(np.sort(classes), count).astype(np.int32)
    numbers = (np.arange(count) // len(classes)).astype(np.int32)
    images = to_uint8(np.concatenate(list(evaluation.drawn(evaluation.protocol, labels, numbers))))
    found, squares = distances.nearest(evaluation.features(images)[0], known.features)
    some = known.features[spread(len(known.features), 1000)]
    apart = np.sqrt(np.median(distances.radii(known.features, 1, some)))
    return images, train[known.rows[found]], np.sqrt(squares) / apart


def evenly(n: int, count: int) -> np.ndarray:
    """So many places of n things, evenly, each as often as the others."""
    return (np.arange(count) * n) // count
