"""How good the images that a run draws are."""

from typing import Any

import numpy as np

from taming_jax.data.datasets import evenly_spaced
from taming_jax.evaluation.protocol import Protocol
from taming_jax.evaluation.subject import Evaluator
from taming_jax.metrics import distances
from taming_jax.metrics.distances import FeatureStats


def samples(evaluation: Evaluator) -> dict[str, Any]:
    """The report of new images, of classes as frequent as in the split."""
    protocol, classifier = evaluation.protocol, evaluation.classifier
    order = np.sort(evaluation.chosen.labels, kind="stable")
    labels = order[np.arange(protocol.samples) * len(order) // protocol.samples].astype(np.int32)
    stats = FeatureStats(len(labels), protocol.kept)
    probabilities: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for images in evaluation.drawn(labels):
        features, classes = evaluation.features(images)
        stats.add(features)
        probabilities.append(classes)
        if classifier is not None:
            own = classes if classifier is evaluation.features else classifier(images)[1]
            predictions.append(own.argmax(1))
    report: dict[str, Any] = {
        "fd": distances.frechet_distance(stats.moments, evaluation.reference_moments),
        **feature_distances(protocol, evaluation.reference.features, stats.features),
    }
    if evaluation.extractor.name == "InceptionV3":
        mean, deviation = distances.inception_score(
            np.concatenate(probabilities), seed=protocol.seed
        )
        report |= {"inception_score": mean, "inception_score_deviation": deviation}
    if predictions:
        report["accuracy"] = float((np.concatenate(predictions) == labels).mean())
    return report


def feature_distances(protocol: Protocol, real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Kernel distance, precision, recall, density and coverage of features [m,d] to features
    [n,d]; nothing where there are too few of them."""
    if min(len(real), len(fake)) <= protocol.neighbours:
        return {}
    kd, deviation = distances.kernel_distance(fake, real, protocol.seed)
    shares = distances.compute_prdc(real, fake, protocol.neighbours)
    return {"kd": kd, "kd_deviation": deviation} | shares


def nearest(evaluation: Evaluator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` samples uint8 [n,h,w,c], those training images (of at most `kept` of them) that are
    nearest to them by their features, and how far these are, [n], in units of the distance of a
    training image from its nearest."""
    train = evaluation.subset("train", evaluation.protocol.kept)
    features = evaluation.feature_stats(train, "training images").features
    labels = np.resize(evenly_spaced(len(evaluation.splits.class_names), count), count).astype(
        np.int32
    )
    images = np.concatenate(list(evaluation.drawn(labels)))
    numbers, squares = distances.find_nearest(evaluation.features(images)[0], features)
    some = features[evenly_spaced(len(features), 1000)]
    unit = np.sqrt(np.median(distances.compute_radii(features, 1, some)))
    return images, train[numbers], np.sqrt(squares) / unit
