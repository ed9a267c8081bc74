"""Metrics of a run's samples."""

from typing import Any

import numpy as np

from taming_jax.data.datasets import evenly_spaced
from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.evaluation.protocol import Protocol
from taming_jax.metrics import distances
from taming_jax.metrics.distances import FeatureStats


def evaluate_samples(evaluator: Evaluator) -> dict[str, Any]:
    """Reports on samples, whose classes are as frequent as in the split."""
    protocol, classifier = evaluator.protocol, evaluator.classifier
    labels = np.sort(evaluator.images.labels, kind="stable")
    rows = np.arange(protocol.samples) * len(labels) // protocol.samples
    labels = labels[rows].astype(np.int32)
    stats = FeatureStats(len(labels), protocol.kept)
    probabilities: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for images in evaluator.draw_samples(labels):
        features, classes = evaluator.features(images)
        stats.add(features)
        probabilities.append(classes)
        if classifier is not None:
            scores = classes if classifier is evaluator.features else classifier(images)[1]
            predictions.append(scores.argmax(1))
    report: dict[str, Any] = {
        "fd": distances.frechet_distance(stats.moments, evaluator.reference_moments),
        **compute_feature_distances(protocol, evaluator.reference.features, stats.features),
    }
    if evaluator.extractor.name == "InceptionV3":
        mean, deviation = distances.inception_score(
            np.concatenate(probabilities), seed=protocol.seed
        )
        report |= {"inception_score": mean, "inception_score_deviation": deviation}
    if predictions:
        report["accuracy"] = float((np.concatenate(predictions) == labels).mean())
    return report


def compute_feature_distances(
    protocol: Protocol, real: np.ndarray, fake: np.ndarray
) -> dict[str, float]:
    """Returns the kernel distance, precision, recall, density and coverage of features `fake` [n,d]
    relative to features `real` [m,d], or an empty dict if either has too few rows."""
    if min(len(real), len(fake)) <= protocol.neighbours:
        return {}
    kd, deviation = distances.kernel_distance(fake, real, protocol.seed)
    shares = distances.manifold(real, fake, protocol.neighbours)
    return {"kd": kd, "kd_deviation": deviation} | shares


def find_nearest(evaluator: Evaluator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `count` samples uint8 [n,h,w,c], the nearest training images by features (among at
    most `kept`), and the distances [n] to them, in units of the median distance between a training
    image and its nearest neighbor."""
    train = evaluator.select_images("train", evaluator.protocol.kept)
    features = evaluator.compute_feature_stats(train, "training images").features
    labels = np.resize(evenly_spaced(len(evaluator.splits.class_names), count), count).astype(
        np.int32
    )
    images = np.concatenate(list(evaluator.draw_samples(labels)))
    rows, squares = distances.nearest(evaluator.features(images)[0], features)
    queries = features[evenly_spaced(len(features), 1000)]
    unit = np.sqrt(np.median(distances.radii(features, 1, queries)))
    return images, train[rows], np.sqrt(squares) / unit
