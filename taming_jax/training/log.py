"""What a run says: a progress bar on a terminal, else plain lines; JSON lines; TensorBoard."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from taming_jax.errors import say
from taming_jax.training.meter import Meter
from taming_jax.training.writers import JsonLines, TensorBoard, Writer

# What is shown while training, where a stage reports it.
SHOWN = (
    "l1",
    "perceptual",
    "nll",
    "accuracy",
    "bits_per_dim",
    "usage",
    "perplexity",
    "discriminator",
    "adaptive_weight",
)


class Log:
    """The log of one stage of a run, from step `start` of `steps` on.

    Rows beyond `start`, of a run that was killed after its last checkpoint, are removed first: the
    steps will be taken, and logged, again. Rows that the disk does not take are kept until it does.
    """

    def __init__(self, folder: Path, name: str, start: int, steps: int, meter: Meter):
        self._meter = meter
        self.path = folder / "metrics" / f"{name}.jsonl"
        self._file = JsonLines(self.path, start)
        self.rows = self._file.rows
        # Apart from the rows, which are the same whenever and wherever the run is computed.
        self._speed = JsonLines(self.path.with_name(f"{name}_speed.jsonl"), start)
        self._writers: list[Writer] = [TensorBoard(folder / "tensorboard" / name)]
        self._troubled: set[str] = set()
        self._name, self._start, self._steps = name, start, steps
        self._bar: tqdm[Any] | None = None
        self._each("resume", start)

    def begin(self) -> None:
        """Starts the clock, and the bar: what went before, compilation, is no step's time."""
        self._began = self._said = self._steps_began = time.monotonic()
        self._waited, self._row_step = 0.0, self._start
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps, initial=self._start, desc=self._name, unit="step",
                dynamic_ncols=True, smoothing=0.05, file=sys.stderr,
            )  # fmt: skip

    def say(self, sentence: str) -> None:
        """A sentence for the person at the screen."""
        if self._bar is not None:
            self._bar.write(sentence, file=sys.stderr)
        else:
            say(sentence)

    @contextlib.contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """Around the writing of what a run can do without until the disk takes it: that it does not
        is said, once."""
        try:
            yield
        except OSError as error:
            if what not in self._troubled:
                self._troubled.add(what)
                self.say(f"{what} cannot be written ({error}); the run goes on, and tries again.")
        else:
            if what in self._troubled:
                self._troubled.remove(what)
                self.say(f"{what} can be written again.")

    def _each(self, method: str, *arguments: Any) -> None:
        """Calls a method of each writer, whatever becomes of the others."""
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
        """One line of the JSON lines and TensorBoard, and now and then one for the eye. A row of
        training steps also tells how fast they were, and with the operations of one, on a device,
        how much of it they used."""
        row = {"step": step, "epoch": round(epoch, 4), "split": split, **metrics}
        with self.tolerating(f"The log {self.path}"):
            self._file.write(row)
        self._each("scalars", step, split, metrics)
        shown = "  ".join(f"{key} {metrics[key]:.4g}" for key in SHOWN if key in metrics)
        if split == "train":
            shown += self._pace(step, flops)
        if split == "validation":
            self._said = time.monotonic()
            self.say(f"step {step}/{self._steps}  validation  {shown}")
        elif self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
        elif time.monotonic() - self._said > 10 or step == self._steps:
            self._said = time.monotonic()
            self.say(f"step {step}/{self._steps}  {shown}  {self._left(step)}")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        begin = time.monotonic()
        self._steps_began = self._steps_began or begin
        yield
        self._waited += time.monotonic() - begin

    def _pace(self, step: int, flops: float | None) -> str:
        """Notes how fast the steps since the last row were (without what came after that row:
        validation, figures, a checkpoint), what they took of a device, and the share of their time
        that went by waiting for data; returns the share, where it is worth a word."""
        spent, steps = time.monotonic() - self._steps_began, step - self._row_step
        waiting = self._waited / spent
        speed = {"steps_per_second": round(steps / spent, 4), "waiting": round(waiting, 4)}
        speed |= self._meter(flops, steps / spent)
        with self.tolerating(f"The log {self._speed.path}"):
            self._speed.write({"step": step, **speed})
        self._each("scalars", step, "speed", speed)
        self._waited, self._steps_began, self._row_step = 0.0, 0.0, step
        return f"  waiting for data {waiting:.0%}" if waiting >= 0.01 else ""

    def advance(self, step: int) -> None:
        """Shows that `step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def _left(self, step: int) -> str:
        spent = time.monotonic() - self._began
        seconds = math.ceil(spent / (step - self._start) * (self._steps - step))
        minutes, seconds = divmod(seconds, 60)
        return f"{minutes}:{seconds:02d} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for file in (self._file, self._speed):
            with self.tolerating(f"The log {file.path}"):
                file.flush()
            if not file.complete:
                self.say(f"The log {file.path} lacks its last rows.")
        self._each("close")


class Silent:
    """The log of a process that leaves the logging to another."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def begin(self) -> None: ...
    def say(self, sentence: str) -> None: ...
    def row(self, *_: Any) -> None: ...
    def advance(self, step: int) -> None: ...
    def close(self) -> None: ...

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def tolerating(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
