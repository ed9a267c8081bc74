"""The log of a run: messages and metrics on the screen, and rows for the metric writers."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.progress import Progress, say_above
from taming_jax.training.meter import Meter
from taming_jax.training.writers import Writer

# Metrics that are logged, but not shown on the screen.
HIDDEN = ("loss", "codebook", "adversarial", "logits_real", "logits_fake", "skipped", "lecam")


class Log:
    """The log of one stage of a run, from step `start` to `steps`.

    `rows` are the rows logged so far. Those after `start` are discarded: if a run was killed after
    its last checkpoint, the resumed run repeats those steps and logs them again. Writers keep rows
    that they cannot write, and try again.
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
        self._steps, self._last_row_step = steps, start
        self._name = name
        self._progress: Progress | None = None
        self._seconds_waited, self._timer_start = 0.0, time.monotonic()
        self._call_writers("resume", start)

    def log_text(self, name: str, text: str) -> None:
        """Logs a text that describes the run."""
        self._call_writers("text", self._last_row_step, name, text)

    def log_figures(self, step: int, files: Sequence[Path]) -> None:
        """Logs figures from their PNG files. Leaves out files that do not exist."""
        for file in files:
            if file.exists():
                self._call_writers("image", step, file.stem, file)

    def start_progress(self) -> None:
        """Starts the clock and the progress bar. Call this after compilation, so that the speed of
        the steps does not include it."""
        self._timer_start = time.monotonic()
        self._progress = Progress(self._name, self._steps, "steps", initial=self._last_row_step)

    def say(self, sentence: str) -> None:
        """Prints a sentence, above the progress bar if there is one."""
        say_above(sentence)

    @contextlib.contextmanager
    def tolerate_write_errors(self, target: str) -> Iterator[None]:
        """A context for writing `target`, which is not essential to the run. An OSError is reported
        once and not raised."""
        try:
            yield
        except OSError as error:
            if target not in self._unwritable:
                self._unwritable.add(target)
                self.say(
                    f"{target} cannot be written ({error}); the run continues and tries again."
                )
        else:
            if target in self._unwritable:
                self._unwritable.remove(target)
                self.say(f"{target} can be written again.")

    def _call_writers(self, method: str, *arguments: Any) -> None:
        """Calls a method of each writer, even if an earlier writer fails."""
        for writer in self._writers:
            with self.tolerate_write_errors(f"The log for {writer.name}"):
                getattr(writer, method)(*arguments)

    def log_metrics(
        self,
        step: int,
        epoch: float,
        split: str,
        metrics: dict[str, float],
        flops: float | None = None,
    ) -> None:
        """Logs the metrics of a step. For the training split, also logs the speed and, if the
        operations per step on one device, `flops`, are known, the utilization of the device."""
        values = {"epoch": round(epoch, 4), **metrics}
        self.rows.append({"step": step, "split": split, **values})
        self._call_writers("scalars", step, split, values)
        names = [key for key in metrics if key not in HIDDEN and not key.endswith("_gradient")]
        text = "  ".join(f"{key} {metrics[key]:.4g}" for key in names)
        if split == "validation":
            self.say(f"step {step}/{self._steps}  validation  {text}")
        elif self._progress is not None:
            self._progress.set_postfix_str(text + self._log_speed(step, flops), refresh=False)

    @contextlib.contextmanager
    def measure_waiting(self) -> Iterator[None]:
        """A context that measures the time spent waiting for data."""
        start = time.monotonic()
        self._timer_start = self._timer_start or start
        yield
        self._seconds_waited += time.monotonic() - start

    def _log_speed(self, step: int, flops: float | None) -> str:
        """Logs the speed of the steps since the last row, their use of the device, and the share
        of time spent waiting for data. The time excludes validation, figures, and checkpoints after
        the last row. Returns the share of waiting as text, or "" if it is below 1 %."""
        elapsed, steps = time.monotonic() - self._timer_start, step - self._last_row_step
        waiting = self._seconds_waited / elapsed
        speed = {"steps_per_second": round(steps / elapsed, 4), "waiting": round(waiting, 4)}
        self._call_writers("scalars", step, "speed", speed | self._meter(flops, steps / elapsed))
        self._seconds_waited, self._timer_start, self._last_row_step = 0.0, 0.0, step
        return f"  waiting for data {waiting:.0%}" if waiting >= 0.01 else ""

    def advance(self, step: int) -> None:
        """Advances the progress bar to `step`."""
        if self._progress is not None:
            self._progress.update(step - self._progress.n)

    def close_progress(self) -> None:
        """Shows the last state of the progress bar, after which no more steps come."""
        if self._progress is not None:
            self._progress.close()

    def close(self) -> None:
        self.close_progress()
        self._call_writers("close")
        for target in sorted(self._unwritable):
            self.say(f"{target} could not be written completely.")


def average_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean of each metric over the steps in which it is finite. A step that was not
    skipped may have non-finite metrics, since only some metrics cause a step to be skipped."""
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if np.isfinite(row.get(name, np.nan))]
        if values:
            means[name] = float(np.mean(values, dtype=np.float64))
    return means


def metric_order(name: str) -> tuple[bool, bool]:
    """Returns a sort key for metrics: single losses first, then their sums, then gradients."""
    return name.endswith("_gradient"), name in ("reconstruction_loss", "nll", "loss")
