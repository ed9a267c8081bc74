"""Progress of long-running work, by tqdm: a bar on a terminal, elsewhere a line every ten seconds.

Work that takes less than ten seconds writes nothing to a file.
"""

import sys
from typing import Any

from tqdm import tqdm

from taming_jax.errors import say

INTERVAL = 10.0  # seconds from one line to the next
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {remaining} left{postfix}"

_silenced = False


def silence() -> None:
    """Shows no progress from here on, as in all processes but the first."""
    global _silenced
    _silenced = True


class Lines:
    """A stream for tqdm on which each new state of a bar is a line on stderr."""

    last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            say(line, sys.stderr)
            self.last = line

    def flush(self) -> None:
        """Does nothing: `write` does not buffer."""


class Progress(tqdm):
    """A context for work on `total` items, of which `initial` are done."""

    def __init__(self, name: str, total: int, unit: str, *, initial: int = 0, enabled: bool = True):
        terminal, self._most = sys.stderr.isatty(), total
        settings: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
        if not terminal:
            settings = {"file": Lines(), "bar_format": LINE, "miniters": 1}
            settings |= {"mininterval": INTERVAL, "delay": INTERVAL}
        super().__init__(
            desc=name, total=total, unit=f" {unit}", unit_scale=unit == "B", initial=initial,
            disable=_silenced or not enabled, **settings,
        )  # fmt: skip

    def update(self, count: float | None = 1) -> None:
        """Adds finished items, up to the total: the last batch may be padded."""
        super().update(min(count or 0, self._most - self.n))


def say_above(sentence: str) -> None:
    """Prints a sentence on stdout, above the bars on a terminal."""
    with Progress.external_write_mode():
        say(sentence)
