"""Our settings as the official code's YAML files have them; compvis_config.py has the way here."""

import dataclasses
from typing import Any

from taming_jax.config.schema import Config, VQGANConfig
from taming_jax.config.serialization import to_dict
from taming_jax.errors import UserError
from taming_jax.interop.compvis_config import OURS


def yaml_of(
    config: Config, discriminator: bool, classes: int | None, remap: str | None
) -> dict[str, Any]:
    """The official code's settings for a run of stage 1, or of both, whose prior has so many
    classes; and in a part of its own what those cannot say. UserError for what the official models
    cannot be."""
    check_stage1(config.vqgan)
    model = stage1(config, discriminator, remap)
    # Where the weights came from is over.
    vqgan = dataclasses.replace(config.vqgan, init_from=None, discriminator_start_step=None)
    ours = {"vqgan": to_dict(vqgan)}
    settings: Any = config.vqgan
    if classes is not None:
        check_stage2(config)
        settings, first = config.prior, config.vqgan.codes
        gpt = {
            "vocab_size": settings.vocabulary or first + classes,
            "block_size": settings.block_size or config.grid_size ** 2,
            "n_layer": settings.layers, "n_head": settings.heads, "n_embd": settings.width,
            "embd_pdrop": settings.dropout, "resid_pdrop": settings.dropout,
            "attn_pdrop": settings.dropout,
        }  # fmt: skip
        prior = dataclasses.replace(
            settings, init_from=None, vocabulary=gpt["vocab_size"], block_size=gpt["block_size"],
            first_class=first if settings.vocabulary is None else settings.first_class,
            label_dropout=0.0, guidance_scale=None,
        )  # fmt: skip
        ours["prior"] = to_dict(prior)
        model = {
            "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": {
                **condition(settings.vocabulary is not None, prior.first_class, classes),
                "pkeep": settings.keep_codes,
                "transformer_config": {
                    "target": "taming.modules.transformer.mingpt.GPT", "params": gpt,
                },
                "first_stage_config": model,
            },
        }  # fmt: skip
    rate = settings.learning_rate / settings.batch_size
    data = {
        "target": "main.DataModuleFromConfig", "params": {"batch_size": settings.batch_size},
    }  # fmt: skip
    return {"model": {"base_learning_rate": rate} | model, "data": data, OURS: ours}


def condition(shared: bool, first_class: int, classes: int) -> dict[str, Any]:
    """What images are conditioned on: nothing, where the only class is one of the `shared` tokens,
    or their class."""
    if shared and classes == 1:
        return {
            "cond_stage_key": "class_label", "cond_stage_config": "__is_unconditional__",
            "sos_token": first_class,
        }  # fmt: skip
    labelator = {"target": "taming.modules.util.Labelator", "params": {"n_classes": classes}}
    return {"cond_stage_key": "class_label", "cond_stage_config": labelator}


def check_stage1(vqgan: VQGANConfig) -> None:
    """UserError for a stage 1 that the official models cannot be."""
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
    if vqgan.quantizer == "gumbel" and vqgan.code_dim != vqgan.latent_channels:
        raise UserError(
            f"the official GumbelVQ has codes of as many dimensions as latents have channels, not "
            f"{vqgan.code_dim} and {vqgan.latent_channels}; this run cannot be exported."
        )


def check_stage2(config: Config) -> None:
    """UserError for a prior that the official transformer cannot be."""
    for setting, plain in (
        ("norm", "layer"), ("mlp", "gelu"), ("positions", "learned"), ("qk_norm", False),
        ("bias", True), ("mlp_width", None),
    ):  # fmt: skip
        if getattr(config.prior, setting) != plain:
            raise UserError(
                f"the official transformer knows no {setting} but {plain}; this run's is "
                f"{getattr(config.prior, setting)}, and it cannot be exported."
            )


def stage1(config: Config, discriminator: bool, remap: str | None) -> dict[str, Any]:
    """The section of a VQModel or GumbelVQ; `remap` names the file with the codes in use."""
    vqgan, data = config.vqgan, config.data
    params: dict[str, Any] = {
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
    if remap is not None:
        params |= {"remap": remap, "sane_index_shape": True}
    if vqgan.quantizer != "gumbel":
        return {"target": "taming.models.vqgan.VQModel", "params": params}
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
    return {"target": "taming.models.vqgan.GumbelVQ", "params": params}
