"""Runs as checkpoints of the official code (CompVis/taming-transformers)."""

from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import RunFailed, say
from taming_jax.interop.compvis import lpips_state_dict, tables_of
from taming_jax.interop.compvis_config import exported, yaml_of
from taming_jax.interop.imports import Model
from taming_jax.models.lpips import load_lpips
from taming_jax.storage import atomic_write
from taming_jax.training.checkpoints import Checkpoint, Store
from taming_jax.weights.layout import paths, theirs
from taming_jax.weights.state_dict import write_state_dict

LOW = -50.0  # the logit of what is never to be drawn


def export_run(folder: Path, out: Path, stage: str | None) -> int:
    """Writes the best checkpoint of a run's stage (default: the prior, where there is one) into a
    file, and its YAML beside it; returns its step. UserError for what the official models cannot
    be, RunFailed where the files cannot be written."""
    import yaml

    stage = stage or ("prior" if Store(folder, "prior").steps() else "vqgan")
    checkpoint = Store(folder, stage).load_best()
    own, names = checkpoint.config, class_names_of(checkpoint)
    model = Model(exported(own, len(names)), names, "discriminator" in checkpoint.nets)
    content = yaml.safe_dump(yaml_of(model))
    arrays = official_arrays(model, checkpoint) | constants(model, checkpoint.step)
    if own.vqgan.l2_normalise:
        say(
            "The codes are given in length one: their indices and pictures are the same, but the "
            "official code does not scale latents, and would train otherwise."
        )
    if names and own.prior.vocabulary is None:
        say(
            f"Class c is token {own.vqgan.codebook_size} + c: give it so. The token of no class is "
            "left out, since the official code knows no guidance."
        )
    try:
        atomic_write(out.with_suffix(".yaml"), content.encode())
        write_state_dict(out, arrays, {"global_step": checkpoint.step})
    except OSError as error:
        raise RunFailed(f"{out} could not be written: {error.strerror or error}.") from error
    return checkpoint.step


def class_names_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the classes of a checkpoint's prior; none where it has no prior."""
    if "transformer" not in checkpoint.nets:
        return ()
    if checkpoint.dataset is not None:
        return tuple(checkpoint.dataset["class_names"])
    tokens = len(checkpoint.nets["transformer"]["params"]["embedding"])
    return tuple(map(str, range(tokens - checkpoint.config.vqgan.codebook_size - 1)))


def official_arrays(model: Model, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The networks' arrays under the official names, with normalised codes in length one and logits
    for all tokens."""
    nets, networks = checkpoint.nets, {"generator": dict(checkpoint.generator)}
    if model.config.vqgan.l2_normalise:
        quantizer = networks["generator"]["quantizer"]
        lengths = np.linalg.norm(quantizer["codebook"], axis=-1, keepdims=True)
        codes = quantizer["codebook"] / lengths
        networks["generator"]["quantizer"] = quantizer | {"codebook": codes}
    if model.discriminator:
        net = nets["discriminator"]
        stats = net["extra"]["batch_stats"]
        networks["discriminator"] = {"params": net["params"], "batch_stats": stats}
    if model.class_names:
        tokens = model.config.prior.vocabulary
        assert tokens is not None  # of an exported config
        networks["transformer"] = with_class_logits(nets["transformer"]["params"], tokens)
    return {
        prefix + name: array
        for network, (table, prefix) in tables_of(model).items()
        for name, array in theirs(table(paths(networks[network])), networks[network]).items()
    }


def with_class_logits(transformer: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A transformer with logits for `tokens` tokens, made from one that predicts codes and no
    classes: the logits of classes are low, whatever the state.

    The last norm returns scale * n + bias, and the n of all channels add up to zero. So 1 / scale
    in the head gives a constant: the sum of bias / scale. That is made large by adding scale to the
    bias, once; what codes get by it is taken from them by the same constant.
    """
    head, norm = transformer["head"], transformer["norm_out"]
    missing = tokens - head.shape[1]
    if not missing:
        return transformer
    scale, bias = (np.asarray(norm[name], np.float64) for name in ("scale", "bias"))
    scale = np.where(np.abs(scale) < 1e-6, 1e-6, scale)
    bias = bias + scale
    constant = (bias / scale).sum()
    codes = head - np.outer(1 / scale, scale @ head) / constant
    classes = np.repeat((LOW / constant / scale)[:, None], missing, 1)
    return transformer | {
        "head": np.concatenate([codes, classes], 1).astype(np.float32),
        "norm_out": {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)},
    }


def constants(model: Model, step: int) -> dict[str, np.ndarray]:
    """What the official modules hold besides, so that they load strictly: attention's masks, how
    long BatchNorm ran, the perceptual loss."""
    config, tables = model.config, tables_of(model)
    arrays: dict[str, np.ndarray] = {}
    _, generator = tables["generator"]
    if size := config.prior.block_size if model.class_names else None:
        mask = np.tril(np.ones((size, size), np.float32))[None, None]
        for i in range(config.prior.layers):
            arrays[f"transformer.blocks.{i}.attn.mask"] = mask
    if model.discriminator:
        for i in range(1, config.vqgan.discriminator_layers + 1):
            name = f"{generator}loss.discriminator.main.{3 * i}.num_batches_tracked"
            arrays[name] = np.array(step, np.int64)
        for name, array in lpips_state_dict(load_lpips()).items():
            arrays[f"{generator}loss.perceptual_loss.{name}"] = array
    return arrays
