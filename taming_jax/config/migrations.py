"""The format number of config.json and of checkpoints, and the migration of older formats.

Files without a format number have format 1.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import UserError

FORMAT = 9

Arrays = dict[tuple[str, ...], np.ndarray]


def add_skipped(arrays: Arrays) -> Arrays:
    """Adds the count of skipped steps, which states have had since format 2."""
    return {("skipped",): np.zeros((), np.int32)} | arrays


def remove_used_codes(config: dict[str, Any]) -> dict[str, Any]:
    """Removes the setting `used_codes`, since all codes of a codebook are in use from format 5 on.
    Raises UserError if a config uses only some of them."""
    vqgan = dict(config.get("vqgan", {}))
    if vqgan.pop("used_codes", None):
        raise UserError(
            "remapped codes (used_codes) are no longer supported; use an older taming_jax."
        )
    return config | {"vqgan": vqgan}


# Settings and metrics that were renamed in format 6.
RENAMED_SETTINGS = {
    "data": {"bad_share": "max_corrupt_fraction", "squeeze": "resize_mode"},
    "vqgan": {"clip": "grad_clip_norm"},
    "prior": {"clip": "grad_clip_norm", "keep_codes": "token_keep_prob"},
}
RENAMED_METRICS = {
    "vqgan": {"nll": "reconstruction_loss"},
    "prior": {"bits_per_dim": "code_bits_per_subpixel"},
}


def rename_keys(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Renames some keys of a dictionary and keeps their order."""
    return {names.get(key, key): value for key, value in values.items()}


def rename_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Renames the settings that format 6 renamed, and converts `resize_mode` from bool to str."""
    sections = {
        section: rename_keys(config[section], names)
        for section, names in RENAMED_SETTINGS.items() if isinstance(config.get(section), dict)
    }  # fmt: skip
    data = sections.get("data", {})
    if isinstance(squeeze := data.get("resize_mode"), bool):
        data["resize_mode"] = "squeeze" if squeeze else "crop"
    return config | sections


def add_attention_dropout(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the dropout rate of the attention weights, which was that of the other layers (by
    default 0.1) before format 7."""
    prior = config.get("prior")
    if not isinstance(prior, dict):
        return config
    return config | {"prior": prior | {"attention_dropout": prior.get("dropout", 0.1)}}


# Where format 9 moved the quantizers' settings in the section vqgan: the quantizer and the name.
MOVED_SETTINGS = {
    "commitment": ("vq", "commitment"), "legacy_commitment": ("vq", "legacy_commitment"),
    "l2_normalise": ("vq", "l2_normalise"), "gumbel_temperature": ("gumbel", "temperature"),
    "kl_weight": ("gumbel", "kl_weight"),
}  # fmt: skip


def group_quantizer_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Moves the settings of quantizers to sections of their own, and renames nearest to vq."""
    vqgan = config.get("vqgan")
    if not isinstance(vqgan, dict):
        return config
    vqgan = dict(vqgan)
    for old, (quantizer, new) in MOVED_SETTINGS.items():
        if old in vqgan:
            vqgan[quantizer] = vqgan.get(quantizer, {}) | {new: vqgan.pop(old)}
    if vqgan.get("quantizer") == "nearest":
        vqgan["quantizer"] = "vq"
    return config | {"vqgan": vqgan}


# Functions that migrate a config's settings and a checkpoint's arrays from each format to the next.
SETTINGS_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: dict, 2: dict, 3: dict, 4: remove_used_codes, 5: rename_settings, 6: add_attention_dropout,
    7: dict, 8: group_quantizer_settings,
}  # fmt: skip
ARRAY_MIGRATIONS: dict[int, Callable[[Arrays], Arrays]] = {
    1: add_skipped, 2: dict, 3: dict, 4: dict, 5: dict, 6: dict, 7: dict, 8: dict,
}  # fmt: skip

MICRO_BATCH_FORMAT = 4  # the first with one adaptive weight per micro-batch in stage 1
SCORE_FORMAT = 6  # the first whose checkpoints store the score that ranks them


def read_format(values: Mapping[str, Any], path: Path) -> int:
    """Returns the format of a file or folder. Raises UserError if it is invalid or too new."""
    number = values.get("format", 1)
    if type(number) is not int or number < 1:
        raise UserError(f"{path} has the format {number!r}, which is not a valid format number.")
    if number > FORMAT:
        raise UserError(
            f"{path} was written by a newer taming_jax (format {number}; this one reads up to "
            f"{FORMAT}); update taming_jax."
        )
    return number


def migrate(content: Any, number: int, steps: Mapping[int, Callable[[Any], Any]]) -> Any:
    """Migrates content from format `number` to `FORMAT`. `steps` maps each format to the function
    that migrates it to the next."""
    for older in range(number, FORMAT):
        content = steps[older](content)
    return content
