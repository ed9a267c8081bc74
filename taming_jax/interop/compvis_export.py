"""Exports runs as checkpoints of the official code (CompVis/taming-transformers)."""

from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import RunFailed, say
from taming_jax.interop.compvis import build_lpips_state_dict, get_layouts
from taming_jax.interop.compvis_config import build_yaml, convert_config
from taming_jax.interop.imports import Model
from taming_jax.models.lpips import load_lpips
from taming_jax.storage import atomic_write
from taming_jax.training.checkpoints import Checkpoint, Store
from taming_jax.weights.layout import convert_to_torch, flatten_shapes, normalize_codes
from taming_jax.weights.state_dict import write_state_dict

LOW_LOGIT = -50.0  # for tokens that must never be sampled


def export_run(folder: Path, out: Path, stage: str | None) -> int:
    """Writes the best checkpoint of a run's stage to a file, and its YAML file next to it. Returns
    the step of the checkpoint. Default stage: the prior if there is one, else stage 1.

    Raises UserError for a run that the official models do not support, and RunFailed if the files
    cannot be written.
    """
    import yaml

    stage = stage or ("prior" if Store(folder, "prior").steps() else "vqgan")
    checkpoint = Store(folder, stage).load_best()
    config, names = checkpoint.config, get_class_names(checkpoint)
    model = Model(convert_config(config, len(names)), names, "discriminator" in checkpoint.nets)
    content = yaml.safe_dump(build_yaml(model))
    arrays = build_official_arrays(model, checkpoint) | build_other_arrays(model, checkpoint.step)
    if config.vqgan.quantizer == "vq" and config.vqgan.vq.l2_normalise:
        say(
            "The exported codes have unit length. Indices and reconstructions stay the same, but "
            "the official code does not normalize latents, so it would train differently."
        )
    if names and config.prior.vocabulary is None:
        say(
            f"Class c is token {config.vqgan.codebook_size} + c in the official code. The token "
            'for "no class" is not exported, since the official code has no guidance.'
        )
    try:
        atomic_write(out.with_suffix(".yaml"), content.encode())
        write_state_dict(out, arrays, {"global_step": checkpoint.step})
    except OSError as error:
        raise RunFailed(f"{out} could not be written ({error.strerror or error}).") from error
    return checkpoint.step


def get_class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns the class names of a checkpoint's prior, or an empty tuple without a prior."""
    if "transformer" not in checkpoint.nets:
        return ()
    if checkpoint.dataset is not None:
        return tuple(checkpoint.dataset["class_names"])
    tokens = len(checkpoint.nets["transformer"]["params"]["embedding"])
    return tuple(map(str, range(tokens - checkpoint.config.vqgan.codebook_size - 1)))


def build_official_arrays(model: Model, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Returns the networks' arrays by their official names. L2-normalized codes have unit length,
    and the logits cover all tokens, including classes."""
    nets, networks = checkpoint.nets, {"generator": dict(checkpoint.generator)}
    if model.config.vqgan.quantizer == "vq" and model.config.vqgan.vq.l2_normalise:
        networks["generator"] = normalize_codes(networks["generator"])
    if model.discriminator:
        net = nets["discriminator"]
        stats = net["extra"]["batch_stats"]
        networks["discriminator"] = {"params": net["params"], "batch_stats": stats}
    if model.class_names:
        tokens = model.config.prior.vocabulary
        assert tokens is not None  # `convert_config` sets it
        networks["transformer"] = add_class_logits(nets["transformer"]["params"], tokens)
    return {
        prefix + name: array
        for network, (build_layout, prefix) in get_layouts(model).items()
        for name, array in convert_to_torch(
            build_layout(flatten_shapes(networks[network])), networks[network]
        ).items()
    }


def add_class_logits(transformer: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Extends the parameters of a transformer that has logits only for codes to logits for `tokens`
    tokens. The logits of classes are low for every input.

    The last norm returns scale * n + bias, where n sums to zero over the channels. A head column of
    1 / scale therefore yields a constant, the sum of bias / scale. Adding scale to the bias makes
    this constant large; the columns of the codes then subtract what that adds to their logits.
    """
    head, norm = transformer["head"], transformer["norm_out"]
    class_count = tokens - head.shape[1]
    if not class_count:
        return transformer
    scale, bias = (np.asarray(norm[name], np.float64) for name in ("scale", "bias"))
    scale = np.where(np.abs(scale) < 1e-6, 1e-6, scale)
    bias = bias + scale
    constant = (bias / scale).sum()
    codes = head - np.outer(1 / scale, scale @ head) / constant
    classes = np.repeat((LOW_LOGIT / constant / scale)[:, None], class_count, 1)
    return transformer | {
        "head": np.concatenate([codes, classes], 1).astype(np.float32),
        "norm_out": {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)},
    }


def build_other_arrays(model: Model, step: int) -> dict[str, np.ndarray]:
    """Returns the other arrays of the official modules, which a strict load requires: attention
    masks, BatchNorm's batch counters, and the perceptual loss."""
    config = model.config
    arrays: dict[str, np.ndarray] = {}
    _, prefix = get_layouts(model)["generator"]
    if size := config.prior.block_size if model.class_names else None:
        mask = np.tril(np.ones((size, size), np.float32))[None, None]
        for i in range(config.prior.layers):
            arrays[f"transformer.blocks.{i}.attn.mask"] = mask
    if model.discriminator:
        for i in range(1, config.vqgan.discriminator_layers + 1):
            name = f"{prefix}loss.discriminator.main.{3 * i}.num_batches_tracked"
            arrays[name] = np.array(step, np.int64)
        for name, array in build_lpips_state_dict(load_lpips()).items():
            arrays[f"{prefix}loss.perceptual_loss.{name}"] = array
    return arrays
