"""The fields of the settings: their ranges of valid values, and whether they may change."""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The valid values of a setting, as a function and in words."""

    contains: Callable[[Any], bool]
    requirement: str


COUNT = Range(lambda x: x >= 1, "must be 1 or more")
NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "must be 0 or more")
POSITIVE = Range(lambda x: 0 < x < math.inf, "must be above 0")
FRACTION = Range(lambda x: 0 <= x <= 1, "must be from 0 to 1")
PROPER_FRACTION = Range(lambda x: 0 < x < 1, "must be above 0 and below 1")
SEED = Range(lambda x: 0 <= x < 2**32, f"must be from 0 to {2**32 - 1}")


def setting(default: Any, values: Range | None = None, meaning: bool = False) -> Any:
    """Returns a field whose value must be None or lie in the range `values`.

    `meaning` declares that a change of the setting changes the meaning of trained weights, even if
    their shapes stay the same.
    """
    return field(default=default, metadata={"range": values, "meaning": meaning})


def free(default: Any, values: Range | None = None) -> Any:
    """Returns a field that may change when a run is resumed."""
    return field(default=default, metadata={"free": True, "range": values})
