"""Checks that settings are valid and do not conflict."""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from taming_jax.config.fields import HasKinds, KindSettings
from taming_jax.config.priors import PRIOR_CONFIGS
from taming_jax.config.quantizers import QUANTIZER_CONFIGS
from taming_jax.config.schema import Config
from taming_jax.errors import UserError, say


def check_ranges(settings: Any, *names: str) -> None:
    """Raises UserError for the first setting that is neither None nor in its range."""
    for field in dataclasses.fields(settings):
        value, values = getattr(settings, field.name), field.metadata.get("range")
        if dataclasses.is_dataclass(value):
            check_ranges(value, *names, field.name)
        elif values is not None and value is not None and not values.contains(value):
            raise UserError(
                f"{format_flag(*names, field.name)} is {value}; it {values.requirement}."
            )


def validate_config(config: Config) -> Config:
    """Returns the config itself. Raises UserError if settings are invalid or conflict."""
    check_ranges(config)
    data, vqgan, prior = config.data, config.vqgan, config.prior
    for name, stage in (("vqgan", vqgan), ("prior", prior)):
        if not all(0 <= beta < 1 for beta in stage.betas):
            betas = " ".join(map(str, stage.betas))
            raise UserError(
                f"--{name}.betas is {betas}; both numbers must be 0 or more and below 1."
            )
        if stage.profile is not None and not 1 <= stage.profile[0] <= stage.profile[1]:
            raise UserError(
                f"--{name}.profile is {stage.profile[0]} {stage.profile[1]}; give the first and "
                "the last step to trace, counted from 1."
            )
    if data.channels not in (1, 3):
        raise UserError(
            f"--data.channels is {data.channels}; it must be 1 (grayscale) or 3 (color)."
        )
    if not vqgan.multipliers or min(vqgan.multipliers) < 1:
        raise UserError(
            "--vqgan.multipliers needs at least one number, and each must be 1 or more."
        )
    halvings = 2 ** (len(vqgan.multipliers) - 1)
    if data.image_size % halvings:
        raise UserError(
            f"--data.image-size {data.image_size} cannot be halved {len(vqgan.multipliers) - 1} "
            f"times, which the {len(vqgan.multipliers)} --vqgan.multipliers require; "
            f"use a multiple of {halvings}."
        )
    # The discriminator halves the image `layers` times, then two convolutions remove a pixel each.
    layers = vqgan.discriminator_layers
    if vqgan.discriminator_start < 1 and data.image_size // 2**layers < 3:
        raise UserError(
            f"--vqgan.discriminator-layers {layers} is too many for images of {data.image_size} "
            "px; use fewer layers."
        )
    if vqgan.perceptual_weight and data.image_size < 16:
        raise UserError(
            f"--data.image-size {data.image_size} is too small for VGG16, which halves an image "
            "four times; use 16 or more, or --vqgan.perceptual-weight 0."
        )
    check_kind("vqgan", vqgan, QUANTIZER_CONFIGS)
    if vqgan.kind_settings is not None:
        vqgan.kind_settings.check(vqgan.codebook_size)
    check_kind("prior", prior, PRIOR_CONFIGS)
    if prior.kind_settings is not None:
        prior.kind_settings.check()
    if prior.vocabulary is not None and prior.vocabulary < vqgan.codebook_size:
        raise UserError(
            f"--prior.vocabulary {prior.vocabulary} is smaller than the codebook; use at least "
            f"{vqgan.codebook_size}."
        )
    # Rotary embeddings rotate pairs of channels, half of them by the row and half by the column.
    multiple = prior.heads * (1 if prior.positions == "learned" else 4)
    if prior.width % multiple:
        raise UserError(
            f"--prior.width {prior.width} does not fit --prior.heads {prior.heads} with "
            f"--prior.positions {prior.positions}; use a multiple of {multiple}."
        )
    if prior.schedule == "one-cycle" and prior.warmup_steps:
        raise UserError(
            "--prior.warmup-steps requires --prior.schedule cosine; set it to 0 for one-cycle, "
            "which has its own warm-up."
        )
    check_sampling(vars(prior), vqgan.codebook_size, prior.label_dropout)
    return config


def check_kind(section: str, settings: HasKinds, kinds: Collection[str]) -> None:
    """Raises UserError if the kind that a section chooses does not exist."""
    name = getattr(settings, settings.selector)
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, 1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise UserError(
            f"there is no {settings.noun} '{name}'{hint}; set "
            f"{format_flag(section, settings.selector)} to one of {', '.join(kinds)}."
        )


def refuse_settings_without_effect(config: Config, base: Config) -> None:
    """Raises UserError if a config differs from the one that it is based on in a setting that has
    no effect with the kinds that it chooses, such as a setting of another quantizer."""
    for section in ("vqgan", "prior"):
        settings, base_settings = getattr(config, section), getattr(base, section)
        selector, noun = format_flag(section, settings.selector), settings.noun
        name = getattr(settings, settings.selector)
        unused = settings.kind_settings.unused if settings.kind_settings else ()
        for field in dataclasses.fields(settings):
            new, old = getattr(settings, field.name), getattr(base_settings, field.name)
            if new == old:
                continue
            if field.name in unused:
                raise UserError(
                    f"{format_flag(section, field.name)} has no effect on the {noun} {name}. "
                    "Leave it out."
                )
            if isinstance(new, KindSettings) and field.name != settings.selected:
                other = field.name.replace("_", "-")
                changed = next(
                    x.name for x in dataclasses.fields(new)
                    if getattr(new, x.name) != getattr(old, x.name)
                )  # fmt: skip
                raise UserError(
                    f"{format_flag(section, field.name, changed)} is a setting of the {noun} "
                    f"{other}, but {selector} is {name}. Leave it out, or set {selector} {other}."
                )


def warn_about_attention(config: Config) -> None:
    """Warns about attention resolutions that have no effect because no level has them."""
    resolutions, sizes = config.vqgan.attention_resolutions, config.level_resolutions
    unmatched = " ".join(str(size) for size in resolutions if size not in sizes)
    if unmatched:
        name = format_flag("vqgan", "attention_resolutions")
        heights = ", ".join(map(str, sizes))
        say(
            f"Warning: {name} {unmatched} has no effect, since the feature maps are {heights} "
            "pixels high."
        )


def check_sampling(settings: Mapping[str, Any], codebook_size: int, label_dropout: float) -> None:
    """Raises UserError if the `temperature`, `top_k`, `top_p` or `guidance_scale` is invalid.

    `label_dropout` is the fraction of examples on which the prior was trained without their class.
    """
    temperature, top_k, top_p = (settings[name] for name in ("temperature", "top_k", "top_p"))
    scale = settings["guidance_scale"]
    if not 0 <= temperature < math.inf:
        raise UserError(f"the temperature is {temperature}; it must be 0 (greedy) or more.")
    if top_k is not None and not 1 <= top_k <= codebook_size:
        raise UserError(
            f"top-k is {top_k}; it must be from 1 to {codebook_size}, the number of codes."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p is {top_p}; it must be above 0 and at most 1.")
    scales = [1.0] if scale is None else np.ravel(scale).tolist()
    if len(scales) not in (1, 2) or not all(0 <= x < math.inf for x in scales):
        raise UserError(
            f"the guidance scale is {scale}; it must be one number or two (for the first and the "
            "last code), each 0 or more."
        )
    if not label_dropout and any(x != 1 for x in scales):
        raise UserError(
            f"a guidance scale of {scale} needs a prior trained with --prior.label-dropout above 0."
        )


def format_flag(*names: str) -> str:
    """Returns the name of a setting as a flag of the command line."""
    return "--" + ".".join(names).replace("_", "-")
