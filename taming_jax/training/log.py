"""What a run reports: sentences and metrics on the screen, and rows to its log destinations."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from taming_jax.progress import Progress, say_above
from taming_jax.training.meter import Meter
from taming_jax.training.writers import Writer

# Metrics that are only logged; all others are shown on the screen, too.
NOT_SHOWN = ("loss", "codebook", "adversarial", "logits_real", "logits_fake", "skipped", "lecam")


class Log:
    """The log of one stage of a run, from step `start` to `steps`.

    `rows` are the rows before `start`. Rows of a run that was killed after its last checkpoint are
    discarded: their steps will be taken, and logged, again. Rows that could not be written are kept
    until they can be.
    """

    def __init__(
        self,
        name: str,
        start: int,
        steps: int,
        rows: Sequence[dict[str, Any]],
        writers: Sequence[Writer],
        meter: Meter,
    ):
        self.rows = [row for row in rows if row["step"] <= start]
        self._writers, self._meter = writers, meter
        self._unwritable: set[str] = set()
        self._steps, self._row_step = steps, start
        self._name = name
        self._progress: Progress | None = None
        self._waited, self._steps_began = 0.0, time.monotonic()
        self._each("resume", start)

    def begin(self) -> None:
        """Starts the clock and the progress, after compilation, which is no step's time."""
        self._steps_began = time.monotonic()
        self._progress = Progress(self._name, self._steps, "steps", initial=self._row_step)

    def say(self, sentence: str) -> None:
        """Prints a sentence, above the progress bar where there is one."""
        say_above(sentence)

    @contextlib.contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """Around writing what a run can do without until it can be written: an error is reported,
        once."""
        try:
            yield
        except OSError as error:
            if what not in self._unwritable:
                self._unwritable.add(what)
                self.say(f"{what} cannot be written ({error}); the run goes on, and tries again.")
        else:
            if what in self._unwritable:
                self._unwritable.remove(what)
                self.say(f"{what} can be written again.")

    def _each(self, method: str, *arguments: Any) -> None:
        """Calls a method of each writer, whether or not those before raised."""
        for writer in self._writers:
            with self.tolerating(f"The log for {type(writer).__name__}"):
                getattr(writer, method)(*arguments)

    def row(
        self,
        step: int,
        epoch: float,
        split: str,
        metrics: dict[str, float],
        flops: float | None = None,
    ) -> None:
        """Logs the metrics of a step. A row of training is followed by one about its speed, and,
        with the operations of a step on one device, how much of the device that used."""
        values = {"epoch": round(epoch, 4), **metrics}
        self.rows.append({"step": step, "split": split, **values})
        self._each("scalars", step, split, values)
        names = [key for key in metrics if key not in NOT_SHOWN and not key.endswith("_gradient")]
        shown = "  ".join(f"{key} {metrics[key]:.4g}" for key in names)
        if split == "validation":
            self.say(f"step {step}/{self._steps}  validation  {shown}")
        elif self._progress is not None:
            self._progress.set_postfix_str(shown + self._pace(step, flops), refresh=False)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        begin = time.monotonic()
        self._steps_began = self._steps_began or begin
        yield
        self._waited += time.monotonic() - begin

    def _pace(self, step: int, flops: float | None) -> str:
        """Logs how fast the steps since the last row were (without what followed that row:
        validation, figures, a checkpoint), what they used of a device, and the share of their time
        spent waiting for data; returns that share where it is worth mentioning."""
        spent, steps = time.monotonic() - self._steps_began, step - self._row_step
        waiting = self._waited / spent
        speed = {"steps_per_second": round(steps / spent, 4), "waiting": round(waiting, 4)}
        self._each("scalars", step, "speed", speed | self._meter(flops, steps / spent))
        self._waited, self._steps_began, self._row_step = 0.0, 0.0, step
        return f"  waiting for data {waiting:.0%}" if waiting >= 0.01 else ""

    def advance(self, step: int) -> None:
        """Shows that `step` steps are done."""
        if self._progress is not None:
            self._progress.update(step - self._progress.n)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        self._each("close")
        for what in sorted(self._unwritable):
            self.say(f"{what} could not be written to the end.")
