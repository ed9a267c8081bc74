"""Converts settings to and from the official code's YAML files."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from taming_jax.config.load import settings
from taming_jax.config.migrations import FORMAT, format_of
from taming_jax.config.schema import UNKNOWN, Config, DataConfig, PriorConfig, VQGANConfig
from taming_jax.config.serialization import from_dict, to_dict
from taming_jax.errors import UserError, say
from taming_jax.interop.imports import Model

IMAGENET = 1000  # classes, where a file does not say how many
OURS = "taming_jax"  # the part of an exported YAML that the official code does not look at
# Settings by their official names: of the networks, the transformer, and a loss with a
# discriminator, with the loss's official defaults.
NETWORK = {
    "ch": "channels", "ch_mult": "multipliers", "num_res_blocks": "blocks",
    "attn_resolutions": "attention_resolutions", "z_channels": "latent_channels",
}  # fmt: skip
GPT = {"n_layer": ("layers", 12), "n_head": ("heads", 8), "n_embd": ("width", 256)}
LOSS: dict[str, tuple[str, Any]] = {
    "perceptual_weight": ("perceptual_weight", 1.0), "codebook_weight": ("codebook_weight", 1.0),
    "disc_weight": ("discriminator_weight", 1.0), "disc_loss": ("discriminator_loss", "hinge"),
    "disc_num_layers": ("discriminator_layers", 3), "disc_ndf": ("discriminator_filters", 64),
}  # fmt: skip
# What our models are, where the official ones have a choice.
ENCODER = {
    "double_z": False, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False,
    "use_linear_attn": False, "attn_type": "vanilla",
}  # fmt: skip
TRANSFORMER = {
    "kind": "autoregressive", "norm": "layer", "mlp": "gelu", "positions": "learned",
    "qk_norm": False, "bias": True, "mlp_width": None,
}  # fmt: skip


def read_yaml(file: Path) -> dict[str, Any]:
    """The content of a model's YAML file. UserError where it is none."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); name the model's YAML."
        ) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file} has no `model`; name the YAML that belongs to the checkpoint.")
    return content


def official(
    content: dict[str, Any], file: Path, classes: int | None = None, step: int = 0
) -> Model:
    """What a YAML's content describes; `file` is where it is from. `classes` is how many classes
    there are, where it does not say, and `step` how far the model was trained.

    Raises UserError for other models than VQModel, GumbelVQ and Net2NetTransformer, and for those
    of them that ours cannot be.
    """
    try:
        if OURS in content:
            part = content[OURS]
            config = settings(part["config"], format_of(part, file))
            config = dataclasses.replace(config, config=file.stem)
            return Model(config, tuple(part["class_names"]), part["discriminator"])
        model = described(content, file, classes, step)
        # As it is read again, types and all.
        return model._replace(config=from_dict(Config, to_dict(model.config)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        missing = f"it does not say {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} cannot be understood: {missing}.") from error


def described(content: dict[str, Any], file: Path, classes: int | None, step: int) -> Model:
    """The model of an official YAML, as in `official`. Raises KeyError, TypeError or ValueError
    where the content is not as expected."""
    model, data = content["model"], (content.get("data") or {}).get("params") or {}
    kind, first = kind_of(model), model
    if kind == "Net2NetTransformer":
        first = model["params"]["first_stage_config"]
    if kind_of(first) not in ("VQModel", "GumbelVQ"):
        raise UserError(
            f"{file} is of {first.get('target')}; VQModel, GumbelVQ and Net2NetTransformer are "
            "read."
        )
    config = stage1(first, file, step)
    batch_size = number(data.get("batch_size", 4))
    rate = float(model.get("base_learning_rate", 4.5e-6)) * batch_size
    names: tuple[str, ...] = ()
    if first is model:
        section = dataclasses.replace(
            config.vqgan, batch_size=batch_size, learning_rate=rate,
            discriminator_learning_rate=rate,
        )  # fmt: skip
        config = dataclasses.replace(config, vqgan=section)
    else:
        prior, names = stage2(model["params"], file, classes)
        prior = dataclasses.replace(prior, batch_size=batch_size, learning_rate=rate)
        config = dataclasses.replace(config, prior=prior)
    return Model(config, names, discriminator_of(first["params"]) is not None)


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


def stage1(section: dict[str, Any], file: Path, step: int) -> Config:
    """A VQModel's or GumbelVQ's settings."""
    params = section["params"]
    dd = params["ddconfig"]
    for key, only in ENCODER.items():
        if dd.get(key, only) != only:
            raise UserError(f"{file} sets {key} to {dd[key]}; only {only} is read.")
    if dd["in_channels"] != dd["out_ch"] or dd["in_channels"] not in (1, 3):
        raise UserError(
            f"{file} is of images of {dd['in_channels']} channels to {dd['out_ch']}; only gray or "
            "colour images to the same are read."
        )
    if params.get("remap"):
        raise UserError(f"{file} uses `remap`, which is not supported.")
    if dd.get("dropout"):
        say(f"{file} has a dropout of {dd['dropout']}, which this one trains on without.")
    sizes: dict[str, Any] = {ours: dd[theirs] for theirs, ours in NETWORK.items()}
    values: dict[str, Any] = {
        name: tuple(map(number, size)) if isinstance(size, list) else number(size)
        for name, size in sizes.items()
    } | {
        "codebook_size": number(params["n_embed"]),
        "code_dim": number(params["embed_dim"]), "commitment": float(params.get("beta", 0.25)),
        # The official VQModel leaves the misplaced weight on.
        "legacy_commitment": bool(params.get("legacy", True)),
    }  # fmt: skip
    if kind_of(section) == "GumbelVQ":
        if dd["z_channels"] != params["embed_dim"]:
            raise UserError(f"{file}: a GumbelVQ's z_channels and embed_dim must be the same.")
        temperature = temperature_at(step, params.get("temperature_scheduler_config") or {})
        values |= {
            "quantizer": "gumbel", "kl_weight": float(params.get("kl_weight", 1e-8)),
            "gumbel_temperature": (temperature, temperature),
        }  # fmt: skip
    loss = discriminator_of(params)
    if loss is not None:
        values |= {ours: type(x)(loss.get(theirs, x)) for theirs, (ours, x) in LOSS.items()}
        values["discriminator_weight"] *= float(loss.get("disc_factor", 1.0))
    data = DataConfig(UNKNOWN, image_size=number(dd["resolution"]), channels=dd["in_channels"])
    return Config(config=file.stem, data=data, vqgan=VQGANConfig(**values))


def temperature_at(step: int, section: dict[str, Any]) -> float:
    """Where a LambdaWarmUpCosineScheduler is after so many steps."""
    schedule = section.get("params") or {}
    most, least = float(schedule.get("lr_max", 1.0)), float(schedule.get("lr_min", 1e-6))
    share = min(step / float(schedule.get("max_decay_steps", 1_000_001)), 1.0)
    return max(least + (most - least) * (1 + math.cos(math.pi * share)) / 2, 1e-6)


def stage2(
    params: dict[str, Any], file: Path, classes: int | None
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
    vocabulary, first = number(gpt["vocab_size"]), 0
    names: tuple[str, ...] = ("image",)
    condition = params.get("cond_stage_config")
    kind = condition if isinstance(condition, str) else kind_of(condition or {})
    of_class = kind == "DummyCondStage" and "class" in str(params.get("cond_stage_key"))
    if params.get("unconditional") or kind in ("__is_unconditional__", "SOSProvider"):
        first = int(params.get("sos_token", 0))
    elif kind == "Labelator" or of_class:
        count = classes or ((condition or {}).get("params") or {}).get("n_classes")
        names = tuple(map(str, range(int(count or min(IMAGENET, vocabulary)))))
    else:
        raise UserError(
            f"{file} conditions images on what {kind} makes of others; only transformers without "
            "a condition, or with a class as theirs, are read."
        )
    if first + len(names) > vocabulary:
        raise UserError(
            f"{file} has {len(names)} classes from token {first}, and only {vocabulary} tokens."
        )
    sizes: dict[str, Any] = {ours: number(gpt.get(theirs, x)) for theirs, (ours, x) in GPT.items()}
    prior = PriorConfig(
        **sizes,
        dropout=max(float(gpt.get(f"{part}_pdrop", 0.0)) for part in ("embd", "resid", "attn")),
        block_size=number(gpt["block_size"]), vocabulary=vocabulary, first_class=first,
        keep_codes=float(params.get("pkeep", 1.0)), label_dropout=0.0, schedule="cosine",
        final_learning_rate=1.0,
    )  # fmt: skip
    return prior, names


def exported(config: Config, classes: int) -> Config:
    """The config of a run as that of an official model, in which classes are tokens after the
    codes, without what belongs to this machine and its data. Raises UserError for what the official
    models cannot be."""
    vqgan, prior = config.vqgan, config.prior
    if reasons := mismatches(vqgan, prior if classes else None):
        raise UserError(f"this run cannot be exported: the official code {'; '.join(reasons)}.")
    vqgan = dataclasses.replace(vqgan, init_from=None, discriminator_start_step=None)
    prior = dataclasses.replace(prior, init_from=None)
    if classes:
        shared = prior.vocabulary is not None
        prior = dataclasses.replace(
            prior, label_dropout=0.0, guidance_scale=None,
            vocabulary=prior.vocabulary or vqgan.codebook_size + classes,
            first_class=prior.first_class if shared else vqgan.codebook_size,
            block_size=prior.block_size or config.grid_size**2,
        )  # fmt: skip
    data = DataConfig(UNKNOWN, image_size=config.data.image_size, channels=config.data.channels)
    return dataclasses.replace(
        config, workdir=None, devices=None, data=data, vqgan=vqgan, prior=prior
    )


def mismatches(vqgan: VQGANConfig, prior: PriorConfig | None) -> list[str]:
    """Returns why the official models cannot be a run's stage 1 and prior."""
    quantizer, channels, latents = vqgan.quantizer, vqgan.channels, vqgan.latent_channels
    blocks, expected = vqgan.decoder_blocks or vqgan.blocks + 1, vqgan.blocks + 1
    reasons = {
        f"has no quantizer {quantizer}": quantizer not in ("nearest", "gumbel"),
        f"needs {expected} blocks per level of the decoder (--vqgan.decoder-blocks), but this run "
        f"has {blocks}": blocks != expected,
        f"needs a multiple of 32 channels, but this run has {channels}": any(
            channels * multiplier % 32 for multiplier in vqgan.multipliers
        ),
        f"needs Gumbel codes of {latents} dimensions, but this run's have {vqgan.code_dim}":
        quantizer == "gumbel" and vqgan.code_dim != latents,
    }  # fmt: skip
    for name, only in TRANSFORMER.items() if prior else ():
        value = getattr(prior, name)
        reasons[f"needs {name} {only}, but this run has {value}"] = value != only
    return [reason for reason, is_missing in reasons.items() if is_missing]


def yaml_of(model: Model) -> dict[str, Any]:
    """The official code's YAML of an `exported` model. A part of our own holds the whole config, of
    which the official settings cannot express everything."""
    config, section = model.config, stage1_section(model)
    settings: Any = config.prior if model.class_names else config.vqgan
    if model.class_names:
        prior, classes = config.prior, len(model.class_names)
        condition: dict[str, Any] = {
            "cond_stage_config": "__is_unconditional__", "sos_token": prior.first_class
        }  # fmt: skip
        if classes > 1:
            labelator = {"target": "taming.modules.util.Labelator"}
            condition = {"cond_stage_config": labelator | {"params": {"n_classes": classes}}}
        gpt = {
            "vocab_size": prior.vocabulary, "block_size": prior.block_size,
            "embd_pdrop": prior.dropout, "resid_pdrop": prior.dropout, "attn_pdrop": prior.dropout,
            **{theirs: getattr(prior, ours) for theirs, (ours, _) in GPT.items()},
        }  # fmt: skip
        section = {
            "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": condition | {
                "cond_stage_key": "class_label", "pkeep": prior.keep_codes,
                "transformer_config": {
                    "target": "taming.modules.transformer.mingpt.GPT", "params": gpt,
                },
                "first_stage_config": section,
            },
        }  # fmt: skip
    rate = settings.learning_rate / settings.batch_size
    return {
        "model": {"base_learning_rate": rate} | section,
        "data": {
            "target": "main.DataModuleFromConfig", "params": {"batch_size": settings.batch_size},
        },
        OURS: {
            "format": FORMAT, "config": to_dict(config), "class_names": list(model.class_names),
            "discriminator": model.discriminator,
        },
    }  # fmt: skip


def stage1_section(model: Model) -> dict[str, Any]:
    """The section of a VQModel or GumbelVQ."""
    vqgan, data = model.config.vqgan, model.config.data
    network = to_dict(vqgan)
    params: dict[str, Any] = {
        "embed_dim": vqgan.code_dim,
        "n_embed": vqgan.codebook_size,
        "ddconfig": {
            "double_z": False, "resolution": data.image_size, "in_channels": data.channels,
            "out_ch": data.channels, "dropout": 0.0,
            **{theirs: network[ours] for theirs, ours in NETWORK.items()},
        },
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    }  # fmt: skip
    if model.discriminator:
        loss = {theirs: getattr(vqgan, ours) for theirs, (ours, _) in LOSS.items()}
        loss |= {"disc_conditional": False, "disc_in_channels": data.channels, "disc_start": 0}
        params["lossconfig"] = {
            "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": loss,
        }
    if vqgan.quantizer != "gumbel":
        return {"target": "taming.models.vqgan.VQModel", "params": params}
    first, last = vqgan.gumbel_temperature
    schedule = {
        "warm_up_steps": 0, "max_decay_steps": 1_000_001, "lr_start": first, "lr_max": first,
        "lr_min": last,
    }  # fmt: skip
    params |= {
        "kl_weight": vqgan.kl_weight,
        "temperature_scheduler_config": {
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": schedule,
        },
    }  # fmt: skip
    return {"target": "taming.models.vqgan.GumbelVQ", "params": params}
