"""Metrics of a run's reconstructions of a split, and of its samples."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax import losses
from taming_jax.data.datasets import evenly_spaced
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.evaluation.protocol import Protocol
from taming_jax.metrics import distances, similarity
from taming_jax.metrics.distances import FeatureStats, Moments
from taming_jax.metrics.features import MICRO_BATCH, VGG_MIN_SIZE
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.models.vqgan import VQGAN, decode_indices, encode, max_batch


def evaluate_reconstructions(evaluator: Evaluator) -> dict[str, Any]:
    """Returns the metrics of the reconstructions of the evaluator's images: means over the images,
    the Fréchet distance to the reference, codebook usage and, if the prior can compute it,
    `likelihood_bits_per_code`."""
    run, devices, images = evaluator.run, evaluator.devices, evaluator.images
    config = run.config
    pixels = config.data.image_size**2
    params: dict[str, Any] = {"generator": jax.tree.map(np.asarray, run.params)}
    if config.data.image_size < VGG_MIN_SIZE:
        evaluator.warnings.append(
            f"No LPIPS: its network needs images of at least {VGG_MIN_SIZE} px."
        )
    else:
        try:
            params["lpips"] = load_lpips()
        except UserError as error:
            evaluator.warnings.append(f"No LPIPS: {error}")
    measure = devices.compile(make_measure(run.float32_model, run.model))
    params = devices.replicate(params)
    size = max_batch(pixels, MICRO_BATCH) * len(devices)
    sums: dict[str, float] = defaultdict(float)
    counts, moments, bits = np.zeros(config.vqgan.codebook_size, np.int64), Moments(), 0.0
    has_likelihood = evaluator.prior_fits
    if has_likelihood:
        try:
            run.prior.check_likelihood(run.prior.grid)
        except UserError as error:
            has_likelihood = False
            evaluator.warnings.append(f"No likelihood: {error}")
    for rows, batch in evaluator.read_batches(images, "reconstructions"):
        decoded, indices, values = devices.map_batches(
            lambda part: measure(params, devices.shard(part)), batch, size
        )
        for name, per_image in values.items():
            sums[name] += float(per_image.sum(dtype=np.float64))
        counts += np.bincount(indices.ravel(), minlength=len(counts))
        moments.add(evaluator.features(decoded)[0])
        if has_likelihood:
            log_likelihood = run.code_log_likelihood(indices, images.labels[rows])
            bits -= float(log_likelihood.sum() / np.log(2))
    n = len(images)
    report: dict[str, Any] = {name: total / n for name, total in sums.items()}
    if n > 1:
        report["fd"] = distances.frechet_distance(moments, evaluator.reference_moments)
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


def make_measure(float32_model: VQGAN, model: VQGAN) -> Callable[[Any, jax.Array], Any]:
    """Returns a function from parameters and images uint8 [b,h,w,c] to the reconstructions uint8
    [b,h,w,c], the codes int32 [b,h',w'], and metrics float32 [b] by name. See `Run` for the
    two models."""

    def measure(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array, dict]:
        real = to_float(images)
        indices = encode(float32_model, params["generator"], real).indices
        decoded = to_uint8(decode_indices(model, params["generator"], indices))
        x, y = images / 255, decoded / 255
        values = {"l1": losses.l1(x, y), "psnr": similarity.psnr(x, y)}
        if images.shape[1] >= similarity.WINDOW:
            values["ssim"] = similarity.ssim(x, y)
        if "lpips" in params:
            with jax.default_matmul_precision("highest"):  # comparable with published numbers
                values["lpips"] = lpips(params["lpips"], real, to_float(decoded))
        return decoded, indices, values

    return measure


def evaluate_samples(evaluator: Evaluator) -> dict[str, Any]:
    """Returns the metrics of samples, whose classes are as frequent as in the split."""
    protocol, classifier = evaluator.protocol, evaluator.classifier
    labels = np.sort(evaluator.images.labels, kind="stable")
    rows = np.arange(protocol.samples) * len(labels) // protocol.samples
    labels = labels[rows].astype(np.int32)
    stats = FeatureStats(len(labels), protocol.kept)
    probabilities: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for images in evaluator.draw_samples(labels):
        features, class_probabilities = evaluator.features(images)
        stats.add(features)
        probabilities.append(class_probabilities)
        if classifier is not None:
            if classifier is not evaluator.features:
                class_probabilities = classifier(images)[1]
            predictions.append(class_probabilities.argmax(1))
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
    prdc = distances.compute_prdc(real, fake, protocol.neighbours)
    return {"kd": kd, "kd_deviation": deviation} | prdc


def find_nearest(evaluator: Evaluator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `count` samples uint8 [n,h,w,c], the nearest of at most `kept` training images
    to each by features, and their distances [n], in units of the median distance between a training
    image and its nearest neighbor."""
    train = evaluator.select_images("train", evaluator.protocol.kept)
    features = evaluator.compute_feature_stats(train, "training images").features
    trained = np.unique(evaluator.splits.train.labels)
    labels = np.resize(trained[evenly_spaced(len(trained), count)], count).astype(np.int32)
    images = np.concatenate(list(evaluator.draw_samples(labels)))
    rows, squares = distances.find_nearest(evaluator.features(images)[0], features)
    queries = features[evenly_spaced(len(features), 1000)]
    unit = np.sqrt(np.median(distances.compute_squared_radii(features, 1, queries)))
    return images, train[rows], np.sqrt(squares) / unit
