"""Progress of long-running work: a bar on a terminal, elsewhere a line every ten seconds.

Work that takes less than ten seconds writes nothing to a file.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from taming_jax.errors import say

INTERVAL = 10.0  # seconds from one line to the next

_silenced = False


def silence() -> None:
    """Shows no progress from here on, as in all processes but the first."""
    global _silenced
    _silenced = True


def duration(seconds: float) -> str:
    """A duration in words, rounded to one unit: "40 seconds", "3 hours", "5 days"."""
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size:
            return f"{round(seconds / size)} {name}s"
    return f"{round(seconds)} seconds"


class Progress:
    """A context for work on `total` items, of which `initial` are done, or in one piece where
    `total` is None.

    On a terminal the items are a bar on stderr. Elsewhere, and for work in one piece, a thread
    writes a line every `INTERVAL` seconds, by `write` (default: to stderr), so that there is one
    also while the first item takes its time. `note` is shown after the numbers.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        unit: str = "",
        *,
        initial: int = 0,
        enabled: bool = True,
        write: Callable[[str], None] | None = None,
    ):
        self._name, self._total, self._unit = name, total, unit
        self._initial = self._done = initial
        self.note = ""
        self._enabled = enabled and not _silenced
        self._write = write or (lambda line: say(line, sys.stderr))
        self._as_bar = write is None and total is not None and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, daemon=True)

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if self._enabled and self._as_bar:
            self._bar = tqdm(
                total=self._total, initial=self._initial, desc=self._name,
                unit=f" {self._unit}".rstrip(), unit_scale=self._unit == "B", dynamic_ncols=True,
                file=sys.stderr,
            )  # fmt: skip
        elif self._enabled:
            self._thread.start()
        return self

    def update(self, count: int = 1) -> None:
        """Counts items that are done."""
        self.advance(self._done + count)

    def advance(self, done: int) -> None:
        """Sets how many items are done."""
        if self._total is not None:  # the last batch may be filled up
            done = min(done, self._total)
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(done - self._done)
        self._done = done

    def say(self, sentence: str) -> None:
        """Prints a sentence on stdout, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(sentence, file=sys.stderr)
        else:
            say(sentence)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()  # so that its line does not come after the next one
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write_lines(self) -> None:
        while not self._over.wait(INTERVAL):
            self._write(self.line())

    def line(self) -> str:
        """The state of the work, as a line."""
        spent = time.monotonic() - self._began
        if self._total is None:
            return f"{self._name}: {duration(spent)} so far"
        size, unit = (2**20, " MiB") if self._unit == "B" else (1, f" {self._unit}".rstrip())
        line = f"{self._name}: {self._done // size} of {self._total // size}{unit}"
        if done := self._done - self._initial:
            line += f", {duration(spent / done * (self._total - self._done))} left"
        return f"{line}  {self.note}".rstrip()
