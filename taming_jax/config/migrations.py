"""The format of what a run leaves: a number in config.json and in each checkpoint, and the way from
an older one to today's. What carries no number is of format 1.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import UserError

FORMAT = 5

Arrays = dict[tuple[str, ...], np.ndarray]


def with_skipped(arrays: Arrays) -> Arrays:
    """Since format 2 a state counts the steps that were skipped."""
    return {("skipped",): np.zeros((), np.int32)} | arrays


def without_used_codes(config: dict[str, Any]) -> dict[str, Any]:
    """Since format 5, all codes of an imported codebook are used."""
    vqgan = dict(config.get("vqgan", {}))
    if vqgan.pop("used_codes", None):
        raise UserError("its remapped codes are no longer supported; use an older version.")
    return config | {"vqgan": vqgan}


# What became of a config's settings, and of a checkpoint's arrays by their names, after format n.
SETTINGS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: dict, 2: dict, 3: dict, 4: without_used_codes
}  # fmt: skip
ARRAYS: dict[int, Callable[[Arrays], Arrays]] = {1: with_skipped, 2: dict, 3: dict, 4: dict}


MICRO_BATCHES = 4  # the first format whose micro-batches of stage 1 have a weight each


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
