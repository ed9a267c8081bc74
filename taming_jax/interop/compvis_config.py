"""Converts settings to and from the official code's YAML files."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from taming_jax.config.load import parse_settings
from taming_jax.config.migrations import FORMAT, read_format
from taming_jax.config.quantizers import GumbelConfig, VQConfig
from taming_jax.config.schema import UNKNOWN, Config, DataConfig, PriorConfig, VQGANConfig
from taming_jax.config.serialization import from_dict, to_dict
from taming_jax.errors import UserError, say
from taming_jax.interop.imports import Model

IMAGENET_CLASSES = 1000  # the default if a file does not set the number of classes
OWN_SECTION = "taming_jax"  # the section of an exported YAML that the official code ignores
# Our settings by their official names: of the networks, the transformer, and a loss with a
# discriminator. `GPT` and `LOSS` include the official defaults.
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
# The only values that both implementations support: `ENCODER` has official settings, and
# `TRANSFORMER` has ours.
ENCODER = {
    "double_z": False, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False,
    "use_linear_attn": False, "attn_type": "vanilla",
}  # fmt: skip
TRANSFORMER = {
    "kind": "autoregressive", "norm": "layer", "mlp": "gelu", "positions": "learned",
    "qk_norm": False, "bias": True, "mlp_width": None,
}  # fmt: skip


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the content of a model's YAML file. Raises UserError if the file cannot be read or
    has no `model` section."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); name the model's YAML file."
        ) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not YAML ({reason}); name the model's YAML file.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file} has no `model` section; name the checkpoint's YAML file.")
    return content


def parse_yaml(
    content: dict[str, Any], file: Path, classes: int | None = None, step: int = 0
) -> Model:
    """Returns the model that the content of a YAML file describes.

    `classes` overrides the number of classes in the file, and `step` is the number of steps that
    the model was trained for. Raises UserError for a model that is not a VQModel, GumbelVQ or
    Net2NetTransformer, or whose settings are invalid or unsupported.
    """
    try:
        if OWN_SECTION in content:
            section = content[OWN_SECTION]
            config = parse_settings(section["config"], read_format(section, file))
            config = dataclasses.replace(config, config=file.stem)
            return Model(config, tuple(section["class_names"]), section["discriminator"])
        model = parse_official(content, file, classes, step)
        # Validates the values and their types.
        return model._replace(config=from_dict(Config, to_dict(model.config)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"it does not set {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{file} is not a valid model description: {reason}. Name the checkpoint's YAML file."
        ) from error


def parse_official(content: dict[str, Any], file: Path, classes: int | None, step: int) -> Model:
    """Does the same as `parse_yaml` for a file without our section. Also raises KeyError,
    TypeError, ValueError, AttributeError or OverflowError if the content is malformed."""
    model, data = content["model"], (content.get("data") or {}).get("params") or {}
    kind, stage1 = get_target_class(model), model
    if kind == "Net2NetTransformer":
        stage1 = model["params"]["first_stage_config"]
    if get_target_class(stage1) not in ("VQModel", "GumbelVQ"):
        raise UserError(
            f"{file} describes {stage1.get('target')}, which is not supported; use a VQModel, "
            "GumbelVQ or Net2NetTransformer."
        )
    config = parse_stage1(stage1, file, step)
    batch_size = parse_size(data.get("batch_size", 4))
    rate = float(model.get("base_learning_rate", 4.5e-6)) * batch_size
    names: tuple[str, ...] = ()
    if stage1 is model:
        section = dataclasses.replace(
            config.vqgan, batch_size=batch_size, learning_rate=rate,
            discriminator_learning_rate=rate,
        )  # fmt: skip
        config = dataclasses.replace(config, vqgan=section)
    else:
        prior, names = parse_stage2(model["params"], file, classes)
        prior = dataclasses.replace(prior, batch_size=batch_size, learning_rate=rate)
        config = dataclasses.replace(config, prior=prior)
    return Model(config, names, get_discriminator_settings(stage1["params"]) is not None)


def parse_size(value: Any) -> int:
    """Returns a size as an int. Raises ValueError if it is not a positive integer below 2**24."""
    if not 0 < float(value) < 2**24 or int(value) != float(value):
        raise ValueError(f"{value} is not a valid size")
    return int(value)


def get_target_class(section: dict[str, Any]) -> str:
    """Returns the class name, without its module, that a section sets as its `target`."""
    return str(section.get("target")).rsplit(".", 1)[-1]


def get_discriminator_settings(params: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the settings of the loss, or None if it has no supported discriminator."""
    loss = params.get("lossconfig") or {}
    settings = loss.get("params") or {}
    unsupported = settings.get("use_actnorm") or settings.get("disc_conditional")
    return (
        settings
        if get_target_class(loss) == "VQLPIPSWithDiscriminator" and not unsupported
        else None
    )


def parse_stage1(section: dict[str, Any], file: Path, step: int) -> Config:
    """Returns the config of a VQModel or GumbelVQ. Raises UserError for unsupported settings."""
    params = section["params"]
    ddconfig = params["ddconfig"]
    for key, supported in ENCODER.items():
        if ddconfig.get(key, supported) != supported:
            raise UserError(f"{file} sets {key} to {ddconfig[key]}; only {supported} is supported.")
    channels, out_channels = ddconfig["in_channels"], ddconfig["out_ch"]
    if channels != out_channels or channels not in (1, 3):
        raise UserError(
            f"{file} describes a model with {channels} input and {out_channels} output channels; "
            "both numbers must be 1 (gray), or both must be 3 (color)."
        )
    if params.get("remap"):
        raise UserError(f"{file} sets remap, which is not supported.")
    if dropout := ddconfig.get("dropout"):
        say(f"{file} sets a dropout of {dropout}. It is ignored: stage 1 trains without dropout.")
    sizes: dict[str, Any] = {name: ddconfig[key] for key, name in NETWORK.items()}
    values: dict[str, Any] = {
        name: tuple(map(parse_size, size)) if isinstance(size, list) else parse_size(size)
        for name, size in sizes.items()
    } | {
        "codebook_size": parse_size(params["n_embed"]),
        "code_dim": parse_size(params["embed_dim"]),
        "vq": VQConfig(
            commitment=float(params.get("beta", 0.25)),
            # By default, the official VQModel puts the commitment weight on the codebook term.
            legacy_commitment=bool(params.get("legacy", True)),
        ),
    }  # fmt: skip
    if get_target_class(section) == "GumbelVQ":
        if ddconfig["z_channels"] != params["embed_dim"]:
            raise UserError(f"{file}: the z_channels and embed_dim of a GumbelVQ must be equal.")
        temperature = compute_temperature(step, params.get("temperature_scheduler_config") or {})
        kl_weight = float(params.get("kl_weight", 1e-8))
        gumbel = GumbelConfig(temperature=(temperature, temperature), kl_weight=kl_weight)
        values |= {"quantizer": "gumbel", "gumbel": gumbel}
    loss = get_discriminator_settings(params)
    if loss is not None:
        values |= {name: type(x)(loss.get(key, x)) for key, (name, x) in LOSS.items()}
        values["discriminator_weight"] *= float(loss.get("disc_factor", 1.0))
    data = DataConfig(UNKNOWN, image_size=parse_size(ddconfig["resolution"]), channels=channels)
    return Config(config=file.stem, dtype="auto", data=data, vqgan=VQGANConfig(**values))


def compute_temperature(step: int, section: dict[str, Any]) -> float:
    """Returns the temperature of a LambdaWarmUpCosineScheduler at a step."""
    schedule = section.get("params") or {}
    high, low = float(schedule.get("lr_max", 1.0)), float(schedule.get("lr_min", 1e-6))
    progress = min(step / float(schedule.get("max_decay_steps", 1_000_001)), 1.0)
    return max(low + (high - low) * (1 + math.cos(math.pi * progress)) / 2, 1e-6)


def parse_stage2(
    params: dict[str, Any], file: Path, classes: int | None
) -> tuple[PriorConfig, tuple[str, ...]]:
    """Returns the settings and the class names of a Net2NetTransformer. Raises UserError for
    unsupported settings."""
    section = params["transformer_config"]
    if get_target_class(section) != "GPT":
        raise UserError(
            f"{file} uses the transformer {section.get('target')}; only mingpt's GPT is supported."
        )
    gpt = section["params"]
    if gpt.get("n_unmasked", 0):
        raise UserError(f"{file} sets n_unmasked to {gpt['n_unmasked']}; only 0 is supported.")
    permuter = params.get("permuter_config")
    if permuter and get_target_class(permuter) != "Identity":
        raise UserError(
            f"{file} permutes its codes with {permuter['target']}; only Identity is supported."
        )
    vocabulary, first_class = parse_size(gpt["vocab_size"]), 0
    names: tuple[str, ...] = ("image",)
    condition = params.get("cond_stage_config")
    kind = condition if isinstance(condition, str) else get_target_class(condition or {})
    is_class = kind == "DummyCondStage" and "class" in str(params.get("cond_stage_key"))
    if params.get("unconditional") or kind in ("__is_unconditional__", "SOSProvider"):
        first_class = int(params.get("sos_token", 0))
    elif kind == "Labelator" or is_class:
        count = classes or ((condition or {}).get("params") or {}).get("n_classes")
        names = tuple(map(str, range(int(count or min(IMAGENET_CLASSES, vocabulary)))))
    else:
        raise UserError(
            f"{file} conditions its transformer on {kind}; only unconditional and "
            "class-conditional transformers are supported."
        )
    if first_class + len(names) > vocabulary:
        raise UserError(
            f"{file} has {len(names)} classes, starting at token {first_class}, but only "
            f"{vocabulary} tokens; check the checkpoint's YAML file and --classes."
        )
    sizes: dict[str, Any] = {name: parse_size(gpt.get(key, x)) for key, (name, x) in GPT.items()}
    prior = PriorConfig(
        **sizes,
        dropout=max(float(gpt.get(f"{part}_pdrop", 0.0)) for part in ("embd", "resid")),
        attention_dropout=float(gpt.get("attn_pdrop", 0.0)),
        block_size=parse_size(gpt["block_size"]), vocabulary=vocabulary, first_class=first_class,
        token_keep_prob=float(params.get("pkeep", 1.0)), label_dropout=0.0, schedule="cosine",
        final_learning_rate=1.0,
    )  # fmt: skip
    return prior, names


def convert_config(config: Config, classes: int) -> Config:
    """Converts a run's config to that of an official model. Without a shared vocabulary, it gets
    one in which the classes follow the codes. Resets the settings of the machine, and those of the
    data except image size and channels. Raises UserError for settings that the official models do
    not support."""
    vqgan, prior = config.vqgan, config.prior
    if reasons := find_mismatches(vqgan, prior if classes else None):
        raise UserError(f"this run cannot be exported: the official code {'; '.join(reasons)}.")
    vqgan = dataclasses.replace(vqgan, init_from=None, discriminator_start_step=None)
    prior = dataclasses.replace(prior, init_from=None)
    if classes:
        is_shared = prior.vocabulary is not None
        prior = dataclasses.replace(
            prior, label_dropout=0.0, guidance_scale=None,
            vocabulary=prior.vocabulary or vqgan.codebook_size + classes,
            first_class=prior.first_class if is_shared else vqgan.codebook_size,
            block_size=prior.block_size or config.grid_size**2,
        )  # fmt: skip
    data = DataConfig(UNKNOWN, image_size=config.data.image_size, channels=config.data.channels)
    return dataclasses.replace(
        config, workdir=None, devices=None, data=data, vqgan=vqgan, prior=prior
    )


def find_mismatches(vqgan: VQGANConfig, prior: PriorConfig | None) -> list[str]:
    """Returns the requirements of the official code that a run does not meet, as phrases."""
    quantizer, channels, latents = vqgan.quantizer, vqgan.channels, vqgan.latent_channels
    blocks, expected = vqgan.decoder_blocks or vqgan.blocks + 1, vqgan.blocks + 1
    mismatches = {
        f"has no quantizer {quantizer}": quantizer not in ("vq", "gumbel"),
        f"needs {expected} blocks per level of the decoder (--vqgan.decoder-blocks), but this run "
        f"has {blocks}": blocks != expected,
        "needs --vqgan.mid-attention": not vqgan.mid_attention,
        f"needs a multiple of 32 channels, but this run has {channels}": any(
            channels * multiplier % 32 for multiplier in vqgan.multipliers
        ),
        f"needs Gumbel codes of {latents} dimensions, but this run's have {vqgan.code_dim}":
        quantizer == "gumbel" and vqgan.code_dim != latents,
    }  # fmt: skip
    for name, supported in TRANSFORMER.items() if prior else ():
        value = getattr(prior, name)
        mismatches[f"needs {name} to be {supported}, but it is {value}"] = value != supported
    return [phrase for phrase, is_mismatch in mismatches.items() if is_mismatch]


def build_yaml(model: Model) -> dict[str, Any]:
    """Builds the official YAML content of a model whose config comes from `convert_config`. An
    extra section contains the full config, since the official settings cannot express all of it."""
    config, section = model.config, build_stage1_section(model)
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
            "embd_pdrop": prior.dropout, "resid_pdrop": prior.dropout,
            "attn_pdrop": prior.attention_dropout,
            **{key: getattr(prior, name) for key, (name, _) in GPT.items()},
        }  # fmt: skip
        section = {
            "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": condition | {
                "cond_stage_key": "class_label", "pkeep": prior.token_keep_prob,
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
        OWN_SECTION: {
            "format": FORMAT, "config": to_dict(config), "class_names": list(model.class_names),
            "discriminator": model.discriminator,
        },
    }  # fmt: skip


def build_stage1_section(model: Model) -> dict[str, Any]:
    """Builds the YAML section of a VQModel or GumbelVQ."""
    vqgan, data = model.config.vqgan, model.config.data
    settings = to_dict(vqgan)
    params: dict[str, Any] = {
        "embed_dim": vqgan.code_dim,
        "n_embed": vqgan.codebook_size,
        "ddconfig": {
            "double_z": False, "resolution": data.image_size, "in_channels": data.channels,
            "out_ch": data.channels, "dropout": 0.0,
            **{key: settings[name] for key, name in NETWORK.items()},
        },
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    }  # fmt: skip
    if model.discriminator:
        loss = {key: getattr(vqgan, name) for key, (name, _) in LOSS.items()}
        loss |= {"disc_conditional": False, "disc_in_channels": data.channels, "disc_start": 0}
        params["lossconfig"] = {
            "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": loss,
        }
    if vqgan.quantizer != "gumbel":
        return {"target": "taming.models.vqgan.VQModel", "params": params}
    first, last = vqgan.gumbel.temperature
    schedule = {
        "warm_up_steps": 0, "max_decay_steps": 1_000_001, "lr_start": first, "lr_max": first,
        "lr_min": last,
    }  # fmt: skip
    params |= {
        "kl_weight": vqgan.gumbel.kl_weight,
        "temperature_scheduler_config": {
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": schedule,
        },
    }  # fmt: skip
    return {"target": "taming.models.vqgan.GumbelVQ", "params": params}
