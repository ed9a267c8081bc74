"""The official code's YAML files as our settings; compvis_yaml.py has the way back."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from taming_jax.config.schema import UNKNOWN, Config, DataConfig, PriorConfig, VQGANConfig
from taming_jax.config.serialization import from_dict, to_dict
from taming_jax.errors import UserError, say

IMAGENET = 1000  # classes, where a file does not say how many
OURS = "taming_jax"  # the part of an exported YAML that the official code does not look at
WARMUP = 200  # steps in which fresh optimisers get to know weights that are trained


class Official(NamedTuple):
    """A YAML's settings as ours, and what of the file they are of: the prefixes of the names of the
    generator, of the discriminator (None where it has none) and of the transformer."""

    config: Config
    generator: str
    discriminator: str | None
    transformer: str | None
    class_names: tuple[str, ...]


def read_text(file: Path) -> str:
    """A YAML file's text. UserError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); name the model's YAML."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not YAML ({error}).") from error


def official(
    text: str,
    file: Path,
    classes: int | None = None,
    used: tuple[int, ...] | None = None,
    step: int = 0,
) -> Official:
    """What a YAML's text describes; `file` is where it is from. `classes` is how many classes there
    are, where it does not say; `used` the codes that its `remap` names, where they are known; and
    `step` how far the model was trained.

    Raises UserError for what is no YAML of a model, for other models than VQModel, GumbelVQ and
    Net2NetTransformer, and for those of them that ours cannot be.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file} has no `model`; name the YAML that belongs to the checkpoint.")
    try:
        found = described(content, file, classes, used, step)
        # As it is read again, types and all.
        return found._replace(config=from_dict(Config, to_dict(found.config)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        missing = f"it does not say {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} cannot be understood: {missing}.") from error


def described(
    content: dict[str, Any],
    file: Path,
    classes: int | None,
    used: tuple[int, ...] | None,
    step: int,
) -> Official:
    model, ours = content["model"], content.get(OURS) or {}
    kind, params = kind_of(model), model["params"]
    data_params = (content.get("data") or {}).get("params") or {}
    batch_size = number(data_params.get("batch_size", 4))
    rate = float(model.get("base_learning_rate", 4.5e-6)) * batch_size
    if kind in ("VQModel", "GumbelVQ"):
        data, vqgan = stage1(model, file, used, step)
        settings = dataclasses.replace(
            vqgan, batch_size=batch_size, learning_rate=rate, discriminator_learning_rate=rate
        )
        settings = told("vqgan", settings, ours)
        with_discriminator = discriminator_of(params) is not None
        return Official(
            Config(config=file.stem, data=data, vqgan=settings), "",
            "loss.discriminator." if with_discriminator else None, None, (),
        )  # fmt: skip
    if kind != "Net2NetTransformer":
        raise UserError(
            f"{file} is of {model.get('target')}; VQModel, GumbelVQ and Net2NetTransformer are "
            "read."
        )
    first = params["first_stage_config"]
    if kind_of(first) not in ("VQModel", "GumbelVQ"):
        raise UserError(
            f"{file} has a first stage {first.get('target')}; VQModel and GumbelVQ are read."
        )
    data, vqgan = stage1(first, file, used, step)
    vqgan = told("vqgan", vqgan, ours)
    prior, names = stage2(params, file, classes, ours.get("prior") or {})
    prior = dataclasses.replace(prior, batch_size=batch_size, learning_rate=rate)
    prior = told("prior", prior, ours)
    config = Config(config=file.stem, data=data, vqgan=vqgan, prior=prior)
    held = discriminator_of(first["params"]) is not None
    below = "first_stage_model."
    return Official(
        config, below, f"{below}loss.discriminator." if held else None, "transformer.", names
    )


def told(section: str, settings: Any, ours: dict[str, Any]) -> Any:
    """A section's settings, over which those stand that an export wrote down, but for a warm-up
    shorter than fresh optimisers need (one cycle begins with its own)."""
    found = from_dict(type(settings), to_dict(settings) | (ours.get(section) or {}), f"{section}.")
    if getattr(found, "schedule", None) == "one-cycle":
        return found
    return dataclasses.replace(found, warmup_steps=max(found.warmup_steps, settings.warmup_steps))


def number(value: Any) -> int:
    """A size. ValueError for what is none."""
    if not 0 < float(value) < 2**24 or int(value) != float(value):
        raise ValueError(f"{value} is no size")
    return int(value)


def kind_of(section: dict[str, Any]) -> str:
    """The name of the class that a section is of."""
    return str(section.get("target")).rsplit(".", 1)[-1]


def discriminator_of(params: dict[str, Any]) -> dict[str, Any] | None:
    """The loss's settings where it has a discriminator that ours can be, else None."""
    loss = params.get("lossconfig") or {}
    settings = loss.get("params") or {}
    other = settings.get("use_actnorm") or settings.get("disc_conditional")
    return settings if kind_of(loss) == "VQLPIPSWithDiscriminator" and not other else None


def stage1(
    section: dict[str, Any],
    file: Path,
    used: tuple[int, ...] | None,
    step: int,
) -> tuple[DataConfig, VQGANConfig]:
    """A VQModel's or GumbelVQ's settings."""
    params = section["params"]
    dd = params["ddconfig"]
    for key, plain in (
        ("double_z", False), ("resamp_with_conv", True), ("give_pre_end", False),
        ("tanh_out", False), ("use_linear_attn", False), ("attn_type", "vanilla"),
    ):  # fmt: skip
        if dd.get(key, plain) != plain:
            raise UserError(f"{file} sets {key} to {dd[key]}; only {plain} is read.")
    if dd["in_channels"] != dd["out_ch"] or dd["in_channels"] not in (1, 3):
        raise UserError(
            f"{file} is of images of {dd['in_channels']} channels to {dd['out_ch']}; only gray or "
            "colour images to the same are read."
        )
    if dd.get("dropout"):
        say(f"{file} has a dropout of {dd['dropout']}, which this one trains on without.")
    data = DataConfig(
        name=UNKNOWN, image_size=number(dd["resolution"]), channels=int(dd["in_channels"])
    )
    vqgan = VQGANConfig(
        channels=number(dd["ch"]), multipliers=tuple(map(number, dd["ch_mult"])),
        blocks=number(dd["num_res_blocks"]),
        attention_resolutions=tuple(map(number, dd["attn_resolutions"])),
        latent_channels=number(dd["z_channels"]),
        codebook_size=number(params["n_embed"]), code_dim=number(params["embed_dim"]),
        commitment=float(params.get("beta", 0.25)),
        # The official VQModel leaves the misplaced weight on.
        legacy_commitment=bool(params.get("legacy", True)), warmup_steps=WARMUP,
        used_codes=used_codes(params, file) if used is None else used,
    )  # fmt: skip
    check_codes(vqgan, file)
    if kind_of(section) == "GumbelVQ":
        if dd["z_channels"] != params["embed_dim"]:
            raise UserError(f"{file}: a GumbelVQ's z_channels and embed_dim must be the same.")
        temperature = temperature_at(step, params.get("temperature_scheduler_config") or {})
        vqgan = dataclasses.replace(
            vqgan, quantizer="gumbel", kl_weight=float(params.get("kl_weight", 1e-8)),
            gumbel_temperature=(temperature, temperature),
        )  # fmt: skip
    loss = discriminator_of(params)
    if loss is None:
        return data, vqgan
    return data, dataclasses.replace(
        vqgan,
        perceptual_weight=float(loss.get("perceptual_weight", 1.0)),
        codebook_weight=float(loss.get("codebook_weight", 1.0)),
        discriminator_weight=float(loss.get("disc_weight", 1.0))
        * float(loss.get("disc_factor", 1.0)),
        discriminator_layers=int(loss.get("disc_num_layers", 3)),
        discriminator_filters=int(loss.get("disc_ndf", 64)),
        discriminator_loss=loss.get("disc_loss", "hinge"),
    )


def temperature_at(step: int, section: dict[str, Any]) -> float:
    """Where a LambdaWarmUpCosineScheduler is after so many steps."""
    schedule = section.get("params") or {}
    most, least = float(schedule.get("lr_max", 1.0)), float(schedule.get("lr_min", 1e-6))
    share = min(step / float(schedule.get("max_decay_steps", 1_000_001)), 1.0)
    return max(least + (most - least) * (1 + math.cos(math.pi * share)) / 2, 1e-6)


def check_codes(vqgan: VQGANConfig, file: Path) -> None:
    """UserError where the codes that are used are none of the codebook's, or not each once."""
    used = vqgan.used_codes
    if used and not (
        len(set(used)) == len(used) and 0 <= min(used) <= max(used) < vqgan.codebook_size
    ):
        raise UserError(f"{file}: the codes that are used are not some of {vqgan.codebook_size}.")


def codes_in(array: np.ndarray) -> tuple[int, ...]:
    """An array of codes. ValueError for what is none."""
    if array.dtype.kind not in "iu" or not array.size:
        raise ValueError(f"it holds {array.size} values of {array.dtype}")
    return tuple(int(code) for code in array.reshape(-1))


def used_codes(params: dict[str, Any], file: Path) -> tuple[int, ...]:
    """The codes that `remap` names, in their new order."""
    remap = params.get("remap")
    if remap is None:
        return ()
    if params.get("unknown_index") == "extra":
        raise UserError(f"{file} remaps unknown codes to one more; that is not read.")
    place = next((p for p in (Path(remap), file.parent / remap) if p.is_file()), None)
    if place is None:
        raise UserError(
            f"{file} remaps its codes by {remap}, which is not there; put it beside {file}."
        )
    try:
        return codes_in(np.load(place, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{place} is no array of codes ({error}).") from error


def stage2(
    params: dict[str, Any], file: Path, classes: int | None, ours: dict[str, Any]
) -> tuple[PriorConfig, tuple[str, ...]]:
    """A Net2NetTransformer's settings, and the names of its classes."""
    section = params["transformer_config"]
    if kind_of(section) != "GPT":
        raise UserError(f"{file} has a transformer {section.get('target')}; mingpt's GPT is read.")
    gpt = section["params"]
    if gpt.get("n_unmasked", 0):
        raise UserError(f"{file} leaves {gpt['n_unmasked']} tokens unmasked; that is not read.")
    permuter = params.get("permuter_config")
    if permuter and kind_of(permuter) != "Identity":
        raise UserError(f"{file} permutes its codes by {permuter['target']}; that is not read.")
    vocabulary = number(gpt["vocab_size"])
    condition = params.get("cond_stage_config")
    kind = condition if isinstance(condition, str) else kind_of(condition or {})
    first = int(ours.get("first_class", 0))
    names: tuple[str, ...] = ("image",)
    if params.get("unconditional") or kind in ("__is_unconditional__", "SOSProvider"):
        first = int(params.get("sos_token", 0))
    elif kind == "Labelator" or (
        kind == "DummyCondStage" and "class" in str(params.get("cond_stage_key"))
    ):
        said = ((condition or {}).get("params") or {}).get("n_classes")
        count = classes or said or min(IMAGENET, vocabulary)
        names = tuple(str(i) for i in range(int(count)))
    else:
        raise UserError(
            f"{file} conditions images on what {kind} makes of others; only transformers without "
            "a condition, or with a class as theirs, are read."
        )
    if first + len(names) > vocabulary:
        raise UserError(
            f"{file} has {len(names)} classes from token {first}, and only {vocabulary} tokens."
        )
    drops = {float(gpt.get(f"{part}_pdrop", 0.0)) for part in ("embd", "resid", "attn")}
    prior = PriorConfig(
        layers=number(gpt.get("n_layer", 12)), heads=number(gpt.get("n_head", 8)),
        width=number(gpt.get("n_embd", 256)), dropout=max(drops),
        block_size=number(gpt["block_size"]),
        vocabulary=vocabulary, first_class=first, keep_codes=float(params.get("pkeep", 1.0)),
        label_dropout=0.0, schedule="cosine", final_learning_rate=1.0, warmup_steps=WARMUP,
    )  # fmt: skip
    return prior, names
