"""The fields of the settings: their ranges of valid values, whether they may change, and the
settings that belong to one of several kinds, such as one of the quantizers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple


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


@dataclass(frozen=True)
class KindSettings:
    """The settings of one of several kinds, such as one quantizer. They are a field, named after
    the kind, of a section that inherits `HasKinds`.

    unused: The settings of that section that have no effect with this kind.
    """

    unused: ClassVar[tuple[str, ...]] = ()


class HasKinds:
    """A section of the settings with a choice of a kind, and a field for the settings of each.

    selector: The setting that names the kind.
    noun: What the kinds are, such as "quantizer".
    """

    selector: ClassVar[str]
    noun: ClassVar[str]

    @property
    def selected(self) -> str:
        """The name of the field for the settings of the chosen kind."""
        return str(getattr(self, self.selector)).replace("-", "_")

    @property
    def kind_settings(self) -> Any:
        """The settings of the chosen kind, or None if it has none."""
        return getattr(self, self.selected, None)


def setting(default: Any, values: Range | None = None, meaning: bool = False) -> Any:
    """Returns a field whose value must be None or lie in the range `values`.

    `meaning` declares that a change of the setting changes the meaning of trained weights, even if
    their shapes stay the same.
    """
    return field(default=default, metadata={"range": values, "meaning": meaning})


def free(default: Any, values: Range | None = None) -> Any:
    """Returns a field that may change when a run is resumed."""
    return field(default=default, metadata={"free": True, "range": values})
