"""The official code's YAML files as our settings, and ours as theirs."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from taming_jax.config import UNKNOWN, Config, DataConfig, PriorConfig, VQGANConfig
from taming_jax.errors import UserError, say
from taming_jax.plain import from_dict, to_dict

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


def yaml_of(config: Config, discriminator: bool, classes: int | None) -> dict[str, Any]:
    """The official code's settings for a run of stage 1, or of both, whose prior has so many
    classes. UserError for what the official models cannot be."""
    vqgan, data = config.vqgan, config.data
    if vqgan.decoder_blocks not in (None, vqgan.blocks + 1):
        raise UserError(
            f"the official decoder has one block a level more than the encoder, not "
            f"{vqgan.decoder_blocks} and {vqgan.blocks}; this run cannot be exported (one of "
            f"--vqgan.decoder-blocks {vqgan.blocks + 1} can)."
        )
    if any(vqgan.channels * multiplier % 32 for multiplier in vqgan.multipliers):
        raise UserError(
            f"the official networks have multiples of 32 channels, not {vqgan.channels}; this run "
            "cannot be exported."
        )
    if vqgan.used_codes:
        raise UserError("a run that uses some of its codes only cannot be exported.")
    gumbel = vqgan.quantizer == "gumbel"
    if gumbel and vqgan.code_dim != vqgan.latent_channels:
        raise UserError(
            f"the official GumbelVQ has codes of as many dimensions as latents have channels, not "
            f"{vqgan.code_dim} and {vqgan.latent_channels}; this run cannot be exported."
        )
    stage = {
        "target": f"taming.models.vqgan.{'GumbelVQ' if gumbel else 'VQModel'}",
        "params": {
            "embed_dim": vqgan.code_dim,
            "n_embed": vqgan.codebook_size,
            "ddconfig": {
                "double_z": False, "z_channels": vqgan.latent_channels,
                "resolution": data.image_size, "in_channels": data.channels,
                "out_ch": data.channels, "ch": vqgan.channels,
                "ch_mult": list(vqgan.multipliers), "num_res_blocks": vqgan.blocks,
                "attn_resolutions": list(vqgan.attention_resolutions), "dropout": 0.0,
            },
            "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        },
    }  # fmt: skip
    params: dict[str, Any] = stage["params"]  # type: ignore[assignment]
    if gumbel:
        first, last = vqgan.gumbel_temperature
        params |= {
            "kl_weight": vqgan.kl_weight,
            "temperature_scheduler_config": {
                "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
                "params": {
                    "warm_up_steps": 0, "max_decay_steps": 1_000_001, "lr_start": first,
                    "lr_max": first, "lr_min": last,
                },
            },
        }  # fmt: skip
    if discriminator:
        params["lossconfig"] = {
            "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {
                "disc_conditional": False, "disc_in_channels": data.channels, "disc_start": 0,
                "disc_weight": vqgan.discriminator_weight,
                "disc_num_layers": vqgan.discriminator_layers,
                "disc_ndf": vqgan.discriminator_filters, "disc_loss": vqgan.discriminator_loss,
                "perceptual_weight": vqgan.perceptual_weight,
                "codebook_weight": vqgan.codebook_weight,
            },
        }  # fmt: skip
    # Where the weights came from is over.
    ours = {"vqgan": to_dict(dataclasses.replace(vqgan, init_from=None))}
    if classes is None:
        rate = vqgan.learning_rate / vqgan.batch_size
        model = {"base_learning_rate": rate} | stage
        return {"model": model, OURS: ours} | batches(vqgan.batch_size)
    prior = config.prior
    for setting, plain in (
        ("norm", "layer"), ("mlp", "gelu"), ("positions", "learned"), ("qk_norm", False),
        ("bias", True), ("mlp_width", None),
    ):  # fmt: skip
        if getattr(prior, setting) != plain:
            raise UserError(
                f"the official transformer knows no {setting} but {plain}; this run's is "
                f"{getattr(prior, setting)}, and it cannot be exported."
            )
    length = (data.image_size // 2 ** (len(vqgan.multipliers) - 1)) ** 2
    net = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": "class_label",
            "cond_stage_config": {
                "target": "taming.modules.util.Labelator", "params": {"n_classes": classes},
            },
            "pkeep": prior.keep_codes,
            "transformer_config": {
                "target": "taming.modules.transformer.mingpt.GPT",
                "params": {
                    "vocab_size": prior.vocabulary or vqgan.codes + classes,
                    "block_size": prior.block_size or length,
                    "n_layer": prior.layers, "n_head": prior.heads, "n_embd": prior.width,
                    "embd_pdrop": prior.dropout, "resid_pdrop": prior.dropout,
                    "attn_pdrop": prior.dropout,
                },
            },
            "first_stage_config": stage,
        },
    }  # fmt: skip
    if prior.vocabulary and classes == 1:
        net["params"] |= {  # type: ignore[operator]
            "cond_stage_config": "__is_unconditional__",
            "sos_token": prior.first_class,
        }
    gpt = net["params"]["transformer_config"]["params"]  # type: ignore[index]
    ours["prior"] = to_dict(
        dataclasses.replace(
            prior, init_from=None, vocabulary=gpt["vocab_size"], block_size=gpt["block_size"],
            first_class=vqgan.codes if prior.vocabulary is None else prior.first_class,
            label_dropout=0.0, guidance_scale=None,
        )
    )  # fmt: skip
    model = {"base_learning_rate": prior.learning_rate / prior.batch_size} | net
    return {"model": model, OURS: ours} | batches(prior.batch_size)


def batches(size: int) -> dict[str, Any]:
    return {"data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": size}}}
