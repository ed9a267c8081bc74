"""Progress of long-running work: a tqdm bar on a terminal, or else a line every ten seconds.

Without a terminal, work that takes less than ten seconds prints nothing.
"""

import sys
from typing import Any

from tqdm import tqdm

from taming_jax.errors import say

INTERVAL = 10.0  # seconds between lines
CURSOR_UP = "\x1b[A"  # tqdm writes it between nested bars
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {remaining} left{postfix}"

_silenced = False


def silence() -> None:
    """Turns progress off in this process. All processes but the primary one call it."""
    global _silenced
    _silenced = True


class LineStream:
    """A stream for tqdm that prints each new state of a bar as a line on stderr."""

    last_line = ""

    def write(self, text: str) -> None:
        line = text.replace(CURSOR_UP, "").strip()
        if line and line != self.last_line:
            say(line, sys.stderr)
            self.last_line = line

    def flush(self) -> None:
        """Does nothing: `write` does not buffer."""


class Progress(tqdm):
    """A progress bar for `total` items, of which `initial` are done; a context manager."""

    def __init__(self, name: str, total: int, unit: str, *, initial: int = 0, enabled: bool = True):
        is_terminal, self._limit = sys.stderr.isatty(), total
        settings: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
        if not is_terminal:
            settings = {"file": LineStream(), "bar_format": LINE, "miniters": 1}
            settings |= {"mininterval": INTERVAL, "delay": INTERVAL}
        super().__init__(
            desc=name, total=total, unit=f" {unit}", unit_scale=unit == "B", initial=initial,
            disable=_silenced or not enabled, **settings,
        )  # fmt: skip

    def update(self, count: float | None = 1) -> None:
        """Adds finished items, at most up to the total, because the last batch may be padded."""
        super().update(min(count or 0, self._limit - self.n))


def say_above(sentence: str) -> None:
    """Prints a sentence on stdout, above the progress bars of a terminal."""
    with Progress.external_write_mode():
        say(sentence)
