"""Which settings can work, and which can work together; a sentence where they cannot."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from taming_jax.errors import UserError, say

if TYPE_CHECKING:
    from taming_jax.config.schema import Config


def check_ranges(settings: Any, *names: str) -> None:
    """UserError for the first setting, none left unset, that is out of its range (schema.py)."""
    for field in dataclasses.fields(settings):
        value, values = getattr(settings, field.name), field.metadata.get("range")
        if dataclasses.is_dataclass(value):
            check_ranges(value, *names, field.name)
        elif values is not None and value is not None and not values.holds(value):
            raise UserError(f"{flag(*names, field.name)} is {value}; it {values.words}.")


def validated(config: "Config") -> "Config":
    """Returns the config itself. Raises UserError if its settings are invalid or conflict."""
    check_ranges(config)
    data, vqgan, prior = config.data, config.vqgan, config.prior
    for name, stage in (("vqgan", vqgan), ("prior", prior)):
        if not all(0 <= beta < 1 for beta in stage.betas):
            raise UserError(f"--{name}.betas must be from 0 to below 1.")
        if stage.profile is not None and not 1 <= stage.profile[0] <= stage.profile[1]:
            raise UserError(
                f"--{name}.profile is {stage.profile[0]} {stage.profile[1]}; name the first step "
                "to trace, 1 or more, and the last."
            )
    if data.channels not in (1, 3):
        raise UserError(f"--data.channels is {data.channels}; it must be 1 (gray) or 3 (colour).")
    if not vqgan.multipliers or min(vqgan.multipliers) < 1:
        raise UserError("--vqgan.multipliers needs at least one number, each 1 or more.")
    halvings = 2 ** (len(vqgan.multipliers) - 1)
    if data.image_size % halvings:
        raise UserError(
            f"--data.image-size {data.image_size} cannot be halved {len(vqgan.multipliers) - 1} "
            f"times, as the {len(vqgan.multipliers)} --vqgan.multipliers ask; "
            f"take a multiple of {halvings}."
        )
    # The discriminator halves the image `layers` times; two more convolutions take a pixel each.
    layers = vqgan.discriminator_layers
    if vqgan.discriminator_start < 1 and data.image_size // 2**layers < 3:
        raise UserError(
            f"--vqgan.discriminator-layers {layers} leave nothing of an image of "
            f"{data.image_size} pixels; take fewer."
        )
    if vqgan.perceptual_weight and data.image_size < 16:
        raise UserError(
            f"--data.image-size {data.image_size} is too small for VGG16, which halves an image "
            "four times; take 16 or more, or --vqgan.perceptual-weight 0."
        )
    if min(vqgan.gumbel_temperature) <= 0:
        raise UserError("--vqgan.gumbel-temperature is two numbers above 0.")
    if prior.vocabulary is not None and prior.vocabulary < vqgan.codebook_size:
        raise UserError(
            f"--prior.vocabulary {prior.vocabulary} does not hold the {vqgan.codebook_size} codes."
        )
    # Rotary positions turn pairs of channels, half of them with the row, half with the column.
    multiple = prior.heads * (1 if prior.positions == "learned" else 4)
    if prior.width % multiple:
        raise UserError(
            f"--prior.width {prior.width} cannot be divided among {prior.heads} --prior.heads; "
            f"take a multiple of {multiple}."
        )
    if prior.schedule == "one-cycle" and prior.warmup_steps:
        raise UserError(
            "--prior.warmup-steps belongs to --prior.schedule cosine; one cycle has its own."
        )
    check_sampling(prior, vqgan.codebook_size, prior.label_dropout)
    return config


def warn_about_attention(config: "Config") -> None:
    """Warns about resolutions of attention that have no effect, since no level has them."""
    resolutions, sizes = config.vqgan.attention_resolutions, config.level_resolutions
    unmatched = " ".join(str(size) for size in resolutions if size not in sizes)
    if unmatched:
        say(
            f"Warning: {flag('vqgan', 'attention_resolutions')} {unmatched} has no effect: the "
            f"feature maps are {', '.join(map(str, sizes))} pixels high."
        )


def check_sampling(settings: Any, codebook_size: int, label_dropout: float) -> None:
    """UserError where the `temperature`, `top_k`, `top_p` or `guidance_scale` of settings cannot
    be, for a prior trained with a share `label_dropout` of examples without their class."""
    top_k, top_p, scale = settings.top_k, settings.top_p, settings.guidance_scale
    if not 0 <= settings.temperature < math.inf:
        raise UserError(
            f"the temperature is {settings.temperature}; it must be 0 (greedy) or more."
        )
    if top_k is not None and not 1 <= top_k <= codebook_size:
        raise UserError(f"top-k is {top_k}; there are 1 to {codebook_size} codes to keep.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p is {top_p}; it is a share above 0, up to 1.")
    scales = [1.0] if scale is None else np.ravel(scale).tolist()
    if len(scales) not in (1, 2) or not all(0 <= x < math.inf for x in scales):
        raise UserError(
            f"the guidance scale is {scale}; it must be one number of 0 or more, or two (the first "
            "code's and the last's)."
        )
    if not label_dropout and any(x != 1 for x in scales):
        raise UserError(
            f"a guidance scale of {scale} needs a prior trained with --prior.label-dropout above 0."
        )


def flag(*names: str) -> str:
    """A setting's name as it is written on the command line."""
    return "--" + ".".join(names).replace("_", "-")
