"""How good the images that a run draws are."""

from typing import Any

import numpy as np

from taming_jax.data.datasets import spread
from taming_jax.data.pixels import to_uint8
from taming_jax.evaluation.protocol import Protocol
from taming_jax.evaluation.subject import Evaluation
from taming_jax.metrics import distances
from taming_jax.metrics.distances import FeatureStats
from taming_jax.metrics.monitor import ranks


def samples(evaluation: Evaluation, protocol: Protocol) -> dict[str, Any]:
    """The report of new images, drawn as `protocol` says: the evaluation's own, or one that differs
    from it in how it samples."""
    reference, classifier = evaluation.reference, evaluation.classifier
    order = np.sort(evaluation.chosen.labels, kind="stable")
    labels = order[np.arange(protocol.samples) * len(order) // protocol.samples].astype(np.int32)
    stats = FeatureStats(len(labels), protocol.kept)
    probabilities: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for part in evaluation.drawn(protocol, labels, ranks(labels)):
        images = to_uint8(part)
        features, classes = evaluation.features(images)
        stats.add(features)
        probabilities.append(classes)
        if classifier is not None:
            own = classes if classifier is evaluation.features else classifier(images)[1]
            predictions.append(own.argmax(1))
    correct = np.concatenate(predictions) == labels if predictions else None
    report: dict[str, Any] = {
        "fd": distances.frechet_distance(stats.moments, evaluation.reference_moments),
        **feature_distances(protocol, reference.features, stats.features),
    }
    if evaluation.extractor.name == "InceptionV3":
        mean, deviation = distances.inception_score(
            np.concatenate(probabilities), seed=protocol.seed
        )
        report |= {"inception_score": mean, "inception_score_deviation": deviation}
    if correct is not None:
        report["accuracy"] = float(correct.mean())
    report["per_class"] = per_class(evaluation, labels, correct, stats)
    return report


def feature_distances(protocol: Protocol, real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Kernel distance, precision, recall, density and coverage of features [m,d] to features
    [n,d]; nothing where there are too few of them."""
    if min(len(real), len(fake)) <= protocol.neighbours:
        return {}
    kd, deviation = distances.kernel_distance(fake, real, protocol.seed)
    shares = distances.manifold(real, fake, protocol.neighbours)
    return {"kd": kd, "kd_deviation": deviation} | shares


def per_class(
    evaluation: Evaluation, labels: np.ndarray, correct: np.ndarray | None, stats: FeatureStats
) -> dict[str, dict[str, Any]]:
    """The same of each class that was drawn; `fd` where there are more images of it than features
    have dimensions."""
    reference, report = evaluation.reference, {}
    of_real, of_fake = evaluation.chosen.labels[reference.rows], labels[stats.rows]
    all_real, all_fake = reference.features, stats.features
    for number in np.unique(labels):
        real, fake = all_real[of_real == number], all_fake[of_fake == number]
        own: dict[str, Any] = {"samples": int((labels == number).sum())}
        if correct is not None:
            own["accuracy"] = float(correct[labels == number].mean())
        if min(len(fake), len(real)) > evaluation.extractor.dimensions:
            own["fd"] = distances.frechet_distance(distances.moments(fake), distances.moments(real))
        own |= feature_distances(evaluation.protocol, real, fake)
        report[evaluation.splits.class_names[number]] = own
    return report


def nearest(evaluation: Evaluation, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` samples uint8 [n,h,w,c], those training images (of at most `kept` of them) that are
    nearest to them by their features, and how far these are, [n], in units of the distance of a
    training image from its nearest."""
    train = evaluation.subset("train", evaluation.protocol.kept)
    features = evaluation.feature_stats(train, "training images").features
    labels = np.resize(spread(len(evaluation.splits.class_names), count), count).astype(np.int32)
    drawn = evaluation.drawn(evaluation.protocol, labels, ranks(labels))
    images = to_uint8(np.concatenate(list(drawn)))
    numbers, squares = distances.nearest(evaluation.features(images)[0], features)
    some = features[spread(len(features), 1000)]
    unit = np.sqrt(np.median(distances.radii(features, 1, some)))
    return images, train[numbers], np.sqrt(squares) / unit
