"""The format of what a run leaves: a number in config.json and in each checkpoint, and the way from
an older one to today's. What carries no number is of format 1.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import UserError

FORMAT = 6

Arrays = dict[tuple[str, ...], np.ndarray]


def with_skipped(arrays: Arrays) -> Arrays:
    """Since format 2 a state counts the steps that were skipped."""
    return {("skipped",): np.zeros((), np.int32)} | arrays


def without_used_codes(config: dict[str, Any]) -> dict[str, Any]:
    """Since format 5 all codes of an imported codebook are used."""
    vqgan = dict(config.get("vqgan", {}))
    if vqgan.pop("used_codes", None):
        raise UserError("its remapped codes are no longer supported; use an older version.")
    return config | {"vqgan": vqgan}


# Settings and metrics that have other names since format 6.
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
    """A dictionary with some keys renamed, in the same order."""
    return {names.get(key, key): value for key, value in values.items()}


def rename_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Since format 6 some settings have other names, and `resize_mode` is a name, not a bool."""
    sections = {
        section: rename_keys(config[section], names)
        for section, names in RENAMED_SETTINGS.items() if isinstance(config.get(section), dict)
    }  # fmt: skip
    data = sections.get("data", {})
    if isinstance(squeeze := data.get("resize_mode"), bool):
        data["resize_mode"] = "squeeze" if squeeze else "crop"
    return config | sections


# Functions from each format to the next, for a config's settings and for a checkpoint's arrays.
SETTINGS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: dict, 2: dict, 3: dict, 4: without_used_codes, 5: rename_settings
}  # fmt: skip
ARRAYS: dict[int, Callable[[Arrays], Arrays]] = {
    1: with_skipped, 2: dict, 3: dict, 4: dict, 5: dict
}  # fmt: skip

MICRO_BATCHES = 4  # the first format whose micro-batches of stage 1 have a weight each
SCORES = 6  # the first format whose checkpoints say by which number they are compared


def format_of(values: Mapping[str, Any], path: Path) -> int:
    """The format of what stands in a file or folder. UserError where that cannot be read here."""
    number = values.get("format", 1)
    if type(number) is not int or number < 1:
        raise UserError(f"{path} says that its format is {number!r}, which is none.")
    if number > FORMAT:
        raise UserError(
            f"{path} was written by a newer taming_jax (format {number}; this one reads up to "
            f"{FORMAT}); update it."
        )
    return number


def migrated(content: Any, number: int, steps: Mapping[int, Callable[[Any], Any]]) -> Any:
    """Content of format `number` as today's, by functions from each format to the next."""
    for older in range(number, FORMAT):
        content = steps[older](content)
    return content
