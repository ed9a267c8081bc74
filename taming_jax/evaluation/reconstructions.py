"""The figures of a split's reconstructions."""

from typing import Any

import jax
import numpy as np

from taming_jax import losses
from taming_jax.data.batches import rounded, to_float
from taming_jax.errors import UserError
from taming_jax.evaluation.subject import Evaluation
from taming_jax.metrics import distances, similarity
from taming_jax.metrics.distances import Collector
from taming_jax.metrics.features import MICRO, VGG_SIZES, fits_vgg
from taming_jax.models.lpips import distance, load_lpips, vgg_features
from taming_jax.models.vqgan import decode_indices, encode, images_at_once


def reconstructions(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of the chosen images' reconstructions; `likelihood_bits_per_code` where there is
    a prior."""
    run, devices, chosen = evaluation.run, evaluation.devices, evaluation.chosen
    config = run.config
    params: dict[str, Any] = {"generator": jax.tree.map(np.asarray, run.params)}
    least = VGG_SIZES[0]
    if config.data.image_size < least:
        evaluation.warnings.append(f"No LPIPS: its network sees {least} pixels and more.")
    else:
        try:
            params["lpips"] = load_lpips()
        except UserError as error:
            evaluation.warnings.append(f"No LPIPS: {error}")
    # Where LPIPS's VGG16 sees the images at the size that the features are of, it runs once.
    of_vgg = evaluation.extractor.name == "VGG16" and fits_vgg(config.data.image_size)
    shared = of_vgg and "lpips" in params
    measure = devices.compile(measurement(evaluation, shared))
    params = devices.replicate(params)
    size = images_at_once(config.data.image_size**2, MICRO) * len(devices)
    sums: dict[str, float] = {}
    counts, bits = np.zeros(config.vqgan.codes, np.int64), 0.0
    made = Collector(len(chosen), 0)
    real = None
    if shared and len(chosen) > 1 and evaluation.kept(chosen) is None:
        real = Collector(len(chosen), evaluation.protocol.kept)
    for here, images in evaluation.parts(chosen, "reconstructions"):
        decoded, indices, found, features = devices.in_batches(
            lambda part: measure(params, devices.shard(part)), images, size
        )
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + float(values.astype(np.float64).sum())
        counts += np.bincount(indices.ravel(), minlength=len(counts))
        if real is not None:
            real.add(features[0])
        made.add(features[1] if shared else evaluation.features(decoded)[0])
        if evaluation.prior_fits:
            likelihood = run.code_likelihood(indices, chosen.labels[here])
            bits -= float(likelihood.sum() / np.log(2))
    if real is not None:  # LPIPS's network saw them
        evaluation.keep(chosen, real)
    n, shares = len(chosen), counts[counts > 0] / counts.sum()
    length, pixels = counts.sum() / n, config.data.image_size**2
    entropy = float(-(shares * np.log2(shares)).sum())
    report: dict[str, Any] = {name: total / n for name, total in sums.items()}
    if n > 1:
        moments, reference = made.collected().moments, evaluation.reference_moments
        with evaluation.phase("Fréchet distance of reconstructions"):
            report["fd"] = distances.frechet_distance(moments, reference)
    report |= {
        "usage": float((counts > 0).mean()),
        "perplexity": 2**entropy,
        "bits_per_pixel": float(length * np.log2(len(counts)) / pixels),
        "entropy_bits_per_pixel": float(length * entropy / pixels),
        "code_counts": counts.tolist(),
    }
    if evaluation.prior_fits:
        report["likelihood_bits_per_code"] = bits / n / length
    return report


def measurement(evaluation: Evaluation, shared: bool) -> Any:
    """The pass over a batch of images uint8: their reconstructions uint8, indices, figures [b],
    and, where it is `shared` with LPIPS's network, the features of both."""
    size, model = evaluation.run.config.data.image_size, evaluation.run.model

    def measure(params: Any, images: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            real = to_float(images)
            indices = encode(model, params["generator"], real).indices
            made = rounded(decode_indices(model, params["generator"], indices))
            x, y = images / 255, made / 255
            found = {"l1": losses.l1(x, y), "psnr": similarity.psnr(x, y)}
            if size >= similarity.WINDOW:
                found["ssim"] = similarity.ssim(x, y)
            features: list[jax.Array] = []
            if "lpips" in params:
                maps = [
                    vgg_features(params["lpips"]["vgg"], each) for each in (real, to_float(made))
                ]
                found["lpips"] = distance(params["lpips"]["heads"], *maps)
                if shared:
                    features = [each[-1].mean((1, 2)) for each in maps]
        return made, indices, found, features

    return measure
