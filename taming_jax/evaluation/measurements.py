"""Measurements of a run's reconstructions and of its samples."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax import losses
from taming_jax.data.datasets import spread
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.metrics import distances, similarity
from taming_jax.metrics.distances import FeatureStats, Moments
from taming_jax.metrics.features import MICRO, VGG_LEAST
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.models.vqgan import VQGAN, decode_indices, encode, images_at_once


def reconstructions(evaluation: Evaluator) -> dict[str, Any]:
    """The report of the reconstructions of the chosen images: means over the images, the Fréchet
    distance to them, and how the codes are used; with a prior that fits the data also
    `likelihood_bits_per_code`."""
    run, devices, chosen = evaluation.run, evaluation.devices, evaluation.chosen
    config = run.config
    pixels = config.data.image_size**2
    params: dict[str, Any] = {"generator": jax.tree.map(np.asarray, run.params)}
    if config.data.image_size < VGG_LEAST:
        evaluation.warnings.append(f"No LPIPS: its network sees {VGG_LEAST} pixels and more.")
    else:
        try:
            params["lpips"] = load_lpips()
        except UserError as error:
            evaluation.warnings.append(f"No LPIPS: {error}")
    measure = devices.compile(measurement(run.model))
    params = devices.replicate(params)
    size = images_at_once(pixels, MICRO) * len(devices)
    sums: dict[str, float] = defaultdict(float)
    counts, moments, bits = np.zeros(config.vqgan.codebook_size, np.int64), Moments(), 0.0
    has_likelihood = evaluation.prior_fits and run.prior.window == run.prior.grid
    if evaluation.prior_fits and not has_likelihood:
        evaluation.warnings.append(
            "No likelihood: an image has more codes than the prior's block_size."
        )
    for place, images in evaluation.parts(chosen, "reconstructions"):
        decoded, indices, values = devices.in_batches(
            lambda part: measure(params, devices.shard(part)), images, size
        )
        for name, each in values.items():
            sums[name] += float(each.sum(dtype=np.float64))
        counts += np.bincount(indices.ravel(), minlength=len(counts))
        moments.add(evaluation.features(decoded)[0])
        if has_likelihood:
            likelihood = run.code_likelihood(indices, chosen.labels[place])
            bits -= float(likelihood.sum() / np.log(2))
    n = len(chosen)
    report: dict[str, Any] = {name: total / n for name, total in sums.items()}
    if n > 1:
        report["fd"] = distances.frechet_distance(moments, evaluation.reference_moments)
    length, shares = counts.sum() / n, counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log2(shares)).sum())
    report |= {
        "usage": float((counts > 0).mean()),
        "perplexity": 2**entropy,
        "bits_per_pixel": float(length * np.log2(len(counts)) / pixels),
        "entropy_bits_per_pixel": float(length * entropy / pixels),
        "code_counts": counts.tolist(),
    }
    if has_likelihood:
        report["likelihood_bits_per_code"] = bits / n / length
    return report


def measurement(model: VQGAN) -> Callable[[Any, jax.Array], Any]:
    """A function of parameters and a batch of images uint8 [b,h,w,c]: their reconstructions uint8,
    their codes int32 [b,h',w'], and measures float32 [b] by name."""

    def measure(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array, dict]:
        with jax.default_matmul_precision("highest"):
            real = to_float(images)
            indices = encode(model, params["generator"], real).indices
            decoded = to_uint8(decode_indices(model, params["generator"], indices))
            x, y = images / 255, decoded / 255
            values = {"l1": losses.l1(x, y), "psnr": similarity.psnr(x, y)}
            if images.shape[1] >= similarity.WINDOW:
                values["ssim"] = similarity.ssim(x, y)
            if "lpips" in params:
                values["lpips"] = lpips(params["lpips"], real, to_float(decoded))
        return decoded, indices, values

    return measure


def samples(evaluation: Evaluator) -> dict[str, Any]:
    """Returns the report of new images, whose classes are as frequent as in the split."""
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
    fd = distances.frechet_distance(stats.moments, evaluation.reference_moments)
    report: dict[str, Any] = {"fd": fd}
    real, fake = evaluation.reference.features, stats.features
    if min(len(real), len(fake)) > protocol.neighbours:
        kd, deviation = distances.kernel_distance(fake, real, protocol.seed)
        report |= {"kd": kd, "kd_deviation": deviation}
        report |= distances.manifold(real, fake, protocol.neighbours)
    if evaluation.extractor.name == "InceptionV3":
        mean, deviation = distances.inception_score(
            np.concatenate(probabilities), seed=protocol.seed
        )
        report |= {"inception_score": mean, "inception_score_deviation": deviation}
    if predictions:
        report["accuracy"] = float((np.concatenate(predictions) == labels).mean())
    return report


def nearest(evaluation: Evaluator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `count` samples uint8 [n,h,w,c], the nearest training images by features (among at
    most `kept`), and the distances [n] to them, in units of the median distance between a training
    image and its nearest neighbor."""
    train = evaluation.subset("train", evaluation.protocol.kept)
    features = evaluation.feature_stats(train, "training images").features
    labels = np.resize(spread(len(evaluation.splits.class_names), count), count).astype(np.int32)
    images = np.concatenate(list(evaluation.drawn(labels)))
    numbers, squares = distances.nearest(evaluation.features(images)[0], features)
    some = features[spread(len(features), 1000)]
    unit = np.sqrt(np.median(distances.radii(features, 1, some)))
    return images, train[numbers], np.sqrt(squares) / unit
