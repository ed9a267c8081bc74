"""How well a run reconstructs the images of a split."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax import losses
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.subject import Evaluator
from taming_jax.metrics import distances, similarity
from taming_jax.metrics.distances import Moments
from taming_jax.metrics.features import MICRO_BATCH, VGG_MIN_SIZE
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.models.vqgan import VQGAN, decode_indices, encode, max_batch


def reconstructions(evaluation: Evaluator) -> dict[str, Any]:
    """The report of the reconstructions of the chosen images: means over the images, the Fréchet
    distance to them, and how the codes are used; with a prior that fits the data also
    `likelihood_bits_per_code`."""
    run, devices, chosen = evaluation.run, evaluation.devices, evaluation.chosen
    config = run.config
    pixels = config.data.image_size**2
    params: dict[str, Any] = {"generator": jax.tree.map(np.asarray, run.params)}
    if config.data.image_size < VGG_MIN_SIZE:
        evaluation.warnings.append(f"No LPIPS: its network sees {VGG_MIN_SIZE} pixels and more.")
    else:
        try:
            params["lpips"] = load_lpips()
        except UserError as error:
            evaluation.warnings.append(f"No LPIPS: {error}")
    measure = devices.compile(measurement(run.model))
    params = devices.replicate(params)
    size = max_batch(pixels, MICRO_BATCH) * len(devices)
    sums: dict[str, float] = defaultdict(float)
    counts, moments, bits = np.zeros(config.vqgan.codebook_size, np.int64), Moments(), 0.0
    has_likelihood = evaluation.prior_fits and run.prior.window == run.prior.grid
    for place, images in evaluation.parts(chosen, "reconstructions"):
        decoded, indices, values = devices.map_batches(
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
