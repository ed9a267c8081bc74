"""Gives a run's best weights back as a checkpoint of the official code
(CompVis/taming-transformers), with its YAML beside it.

    taming-jax export compvis --workdir runs/birds --out birds.safetensors

`--out` ends in .safetensors, or in .ckpt where PyTorch is installed; the YAML has the same name.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from taming_jax.errors import RunFailed, UserError, say
from taming_jax.files import check_writable, write_whole
from taming_jax.weights.state_dict import check_kind

if TYPE_CHECKING:
    from taming_jax.config.schema import Config
    from taming_jax.interop.compvis_config import Official
    from taming_jax.training.checkpoints import Checkpoint

LOW = -50.0  # the logit of what is never to be drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, help="FILE.safetensors or FILE.ckpt")
    parser.add_argument(
        "--stage", choices=("vqgan", "prior"), help="default: the prior, where there is one"
    )
    given = parser.parse_args()
    check_kind(given.out)
    if not given.out.absolute().parent.is_dir():
        folder = given.out.absolute().parent
        raise UserError(f"--out {given.out}: the folder {folder} does not exist; make it.")
    check_writable("--out", given.out)
    work(given)


def work(given: argparse.Namespace) -> None:
    import yaml

    from taming_jax.interop.compvis_config import official
    from taming_jax.interop.compvis_yaml import yaml_of
    from taming_jax.training.checkpoints import Store
    from taming_jax.weights.state_dict import write_state_dict

    if not given.workdir.is_dir():
        raise UserError(f"there is no folder {given.workdir}; name a run's.")
    has_prior = bool(Store(given.workdir, "prior").steps())
    stage = given.stage or ("prior" if has_prior else "vqgan")
    checkpoint = Store(given.workdir, stage).chosen()
    config, nets, step = checkpoint.config, checkpoint.nets, checkpoint.step
    classes, used = classes_of(checkpoint, nets), config.vqgan.used_codes
    remap = f"{given.out.stem}_used.npy" if used else None
    settings = yaml.safe_dump(yaml_of(config, "discriminator" in nets, classes, remap))
    model = official(settings, given.workdir, classes, used)
    arrays = networks(model, nets, config.vqgan.l2_normalise) | beside(model, config, nets, step)
    if config.vqgan.l2_normalise:
        say(
            "The codes are given in length one: their indices and pictures are the same, but the "
            "official code does not scale latents, and would train otherwise."
        )
    if stage == "prior" and config.prior.vocabulary is None:
        say(
            f"Class c is token {config.vqgan.codes} + c: give it so. The token of no class is left "
            "out, since the official code knows no guidance."
        )
    try:
        write_whole(given.out.with_suffix(".yaml"), settings.encode())
        if remap is not None:
            np.save(given.out.with_name(remap), np.array(used))
        write_state_dict(given.out, arrays, {"global_step": int(step)})
    except OSError as error:
        raise RunFailed(f"{given.out} could not be written: {error.strerror or error}.") from error
    print(f"{given.out} and {given.out.with_suffix('.yaml')} hold step {step} of {given.workdir}.")


def classes_of(checkpoint: "Checkpoint", nets: dict[str, Any]) -> int | None:
    """How many classes a checkpoint's prior has; None where it holds none."""
    if "transformer" not in nets:
        return None
    if checkpoint.config.prior.vocabulary is None:
        tokens = len(nets["transformer"]["params"]["embedding"])
        return tokens - checkpoint.config.vqgan.codes - 1
    return len(checkpoint.dataset["class_names"]) if checkpoint.dataset else 1


def networks(model: "Official", nets: dict[str, Any], normalised: bool) -> dict[str, np.ndarray]:
    """The networks' arrays under the official names, with codes of length one where they are
    `normalised`."""
    from taming_jax.interop.compvis import discriminator_layout, gpt_layout, vqgan_layout
    from taming_jax.weights.layout import paths, theirs

    generator = dict(nets["generator"].get("ema", nets["generator"]["params"]))
    if normalised:
        codes = generator["quantizer"]["codebook"]
        lengths = np.linalg.norm(codes, axis=-1, keepdims=True)
        generator["quantizer"] = generator["quantizer"] | {"codebook": codes / lengths}
    tables = [(vqgan_layout, model.generator, generator)]
    if model.discriminator is not None and "discriminator" in nets:
        net = nets["discriminator"]
        variables = {"params": net["params"], "batch_stats": net["extra"]["batch_stats"]}
        tables.append((discriminator_layout, model.discriminator, variables))
    if model.transformer is not None:
        tokens = model.config.prior.vocabulary
        assert tokens is not None  # of an official model
        transformer = with_class_logits(nets["transformer"]["params"], tokens)
        tables.append((gpt_layout, model.transformer, transformer))
    return {
        prefix + name: array
        for table, prefix, params in tables
        for name, array in theirs(table(paths(params)), params).items()
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


def beside(
    model: "Official", config: "Config", nets: dict[str, Any], step: int
) -> dict[str, np.ndarray]:
    """What the official modules hold besides, so that they load strictly: attention's masks, how
    long BatchNorm ran, the perceptual loss, the codes that are used."""
    from taming_jax.interop.compvis import lpips_state_dict
    from taming_jax.models.lpips import load_lpips

    arrays: dict[str, np.ndarray] = {}
    if config.vqgan.used_codes:
        arrays[f"{model.generator}quantize.used"] = np.array(config.vqgan.used_codes)
    if model.transformer is not None:
        size = model.config.prior.block_size
        assert size is not None  # of an official model
        mask = np.tril(np.ones((size, size), np.float32))[None, None]
        for i in range(config.prior.layers):
            arrays[f"{model.transformer}blocks.{i}.attn.mask"] = mask
    if model.discriminator is not None and "discriminator" in nets:
        for i in range(1, config.vqgan.discriminator_layers + 1):
            name = f"{model.discriminator}main.{3 * i}.num_batches_tracked"
            arrays[name] = np.array(step, np.int64)
        loss = f"{model.generator}loss.perceptual_loss."
        arrays |= {loss + name: x for name, x in lpips_state_dict(load_lpips()).items()}
    return arrays
