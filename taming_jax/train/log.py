"""What a run says: a progress bar on a terminal, else plain lines; JSON lines; TensorBoard."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, up to the first line that a crash or a bad disk spoilt."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def continued(path: Path, start: int) -> tuple[list[dict[str, Any]], TextIO]:
    """The rows of a JSON-lines file up to step `start`, and the file, cut there, to go on with."""
    rows = [row for row in read_rows(path) if row["step"] <= start]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
    return rows, path.open("a", encoding="utf-8")


class Log:
    """The log of one stage of a run, from step `start` of `steps` on.

    Rows beyond `start`, of a run that was killed after its last checkpoint, are removed first: the
    steps will be taken, and logged, again.
    """

    def __init__(self, folder: Path, name: str, start: int, steps: int):
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics" / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self._file = continued(self.path, start)
        # Apart from the rows, which are the same whenever and wherever the run is computed.
        self._speed = continued(self.path.with_name(f"{name}_speed.jsonl"), start)[1]
        self._tensorboard = SummaryWriter(str(folder / "tensorboard" / name), purge_step=start + 1)
        self._start, self._steps = start, steps
        self._began = self._said = time.monotonic()
        self._first: int | None = None  # steps before the clock: the first one is compiled
        self._waited, self._steps_began, self._row_step = 0.0, 0.0, start
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True,
                smoothing=0.05, file=sys.stderr,
            )  # fmt: skip

    def say(self, sentence: str) -> None:
        """A sentence for the person at the screen."""
        if self._bar is not None:
            self._bar.write(sentence, file=sys.stderr)
        else:
            print(sentence, flush=True)

    def row(self, step: int, epoch: float, split: str, metrics: dict[str, float]) -> None:
        """One line of the JSON lines and TensorBoard, and now and then one for the eye."""
        row = {"step": step, "epoch": round(epoch, 4), "split": split, **metrics}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in metrics.items():
            self._tensorboard.add_scalar(f"{split}/{key}", value, step)
        shown = "  ".join(f"{key} {metrics[key]:.4g}" for key in SHOWN if key in metrics)
        if split == "train":
            shown += self._pace(step)
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

    def _pace(self, step: int) -> str:
        """Notes how fast the steps since the last row were (without what came after that row:
        validation, figures, a checkpoint), and the share of their time that went by waiting for
        data; answers the share, where it is worth a word."""
        spent, steps = time.monotonic() - self._steps_began, step - self._row_step
        waiting = self._waited / spent
        speed = {"steps_per_second": round(steps / spent, 4), "waiting": round(waiting, 4)}
        self._speed.write(json.dumps({"step": step, **speed}) + "\n")
        self._speed.flush()
        for key, value in speed.items():
            self._tensorboard.add_scalar(f"speed/{key}", value, step)
        self._waited, self._steps_began, self._row_step = 0.0, 0.0, step
        return f"  waiting for data {waiting:.0%}" if waiting >= 0.01 else ""

    def advance(self, step: int) -> None:
        """Shows that `step` steps are done."""
        if self._first is None:
            self._first, self._began = step, time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def _left(self, step: int) -> str:
        spent = time.monotonic() - self._began
        taken = step - (self._start if self._first is None else self._first)
        seconds = math.ceil(spent / max(taken, 1) * (self._steps - step))
        minutes, seconds = divmod(seconds, 60)
        return f"{minutes}:{seconds:02d} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._speed.close()
        self._tensorboard.close()


class Silent:
    """The log of a process that leaves the logging to another."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def say(self, sentence: str) -> None: ...
    def row(self, step: int, epoch: float, split: str, metrics: dict[str, float]) -> None: ...
    def advance(self, step: int) -> None: ...
    def close(self) -> None: ...

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
