"""Metrics of a run's reconstructions of a split."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax import losses
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.metrics import distances, similarity
from taming_jax.metrics.distances import Moments
from taming_jax.metrics.features import MICRO, VGG_LEAST
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.models.vqgan import VQGAN, decode_indices, encode, max_batch


def evaluate_reconstructions(evaluator: Evaluator) -> dict[str, Any]:
    """Reports on the reconstructions of the evaluator's images: means over the images, the Fréchet
    distance to the originals, codebook usage and, if a prior fits the data,
    `likelihood_bits_per_code`."""
    run, devices, images = evaluator.run, evaluator.devices, evaluator.images
    config = run.config
    pixels = config.data.image_size**2
    params: dict[str, Any] = {"generator": jax.tree.map(np.asarray, run.params)}
    if config.data.image_size < VGG_LEAST:
        evaluator.warnings.append(
            f"No LPIPS: its network needs images of at least {VGG_LEAST} pixels."
        )
    else:
        try:
            params["lpips"] = load_lpips()
        except UserError as error:
            evaluator.warnings.append(f"No LPIPS: {error}")
    measure = devices.compile(make_measure(run.model))
    params = devices.replicate(params)
    size = max_batch(pixels, MICRO) * len(devices)
    sums: dict[str, float] = defaultdict(float)
    counts, moments, bits = np.zeros(config.vqgan.codebook_size, np.int64), Moments(), 0.0
    has_likelihood = evaluator.prior_fits and run.prior.window == run.prior.grid
    if evaluator.prior_fits and not has_likelihood:
        evaluator.warnings.append("No likelihood: an image has more codes than a sequence.")
    for rows, batch in evaluator.read_batches(images, "reconstructions"):
        decoded, indices, values = devices.in_batches(
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


def make_measure(model: VQGAN) -> Callable[[Any, jax.Array], Any]:
    """Returns a function of parameters and images uint8 [b,h,w,c] that returns the reconstructions
    uint8 [b,h,w,c], the codes int32 [b,h',w'], and metrics float32 [b] by name."""

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
