"""Log destinations. To add one, write a subclass of `Writer`, and add it to `DESTINATIONS`."""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboardX import summary
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from taming_jax.config.load import remove_machine_settings
from taming_jax.config.schema import Config
from taming_jax.config.serialization import to_dict
from taming_jax.errors import UserError
from taming_jax.storage import atomic_write

PROJECT = "taming_jax"  # of the runs at Weights & Biases and in trackio


class Writer:
    """A destination for the log of one stage. Methods raise OSError if they cannot write; the run
    continues, and calls them again for the next metrics."""

    @property
    def name(self) -> str:
        """What messages call the destination."""
        return type(self).__name__

    def open(self, is_new: bool) -> None:
        """Connects to the destination, before the run changes any file. `is_new` is whether the run
        starts from its beginning. Raises UserError if the destination cannot be used."""

    def resume(self, step: int) -> None:
        """Discards what was logged after `step`: the run resumes from there and logs it again. A
        new run calls this with step 0."""

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Writes the metrics of a step. Their names may differ between steps. `group` is "train",
        "validation", or "speed"."""

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text."""

    def image(self, step: int, name: str, file: Path) -> None:
        """Writes a figure from its PNG file."""

    def close(self) -> None:
        """Writes any buffered metrics and closes the destination."""


def check_destinations(config: Config) -> None:
    """Raises UserError if a destination of `--log` does not exist, or needs a package that is not
    installed."""
    for name in config.log:
        if name not in DESTINATIONS:
            close = difflib.get_close_matches(name, DESTINATIONS, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"use {', '.join(DESTINATIONS)}."
            raise UserError(f"there is no log destination '{name}'; {hint}")
        if name not in SERVICES:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of this name has no origin
            raise UserError(
                f"--log {name} needs the package {name}, which is not installed; run `pip install "
                f"{name}`."
            )


def open_writers(config: Config, stage: str, is_new: bool) -> list[Writer]:
    """Opens the log destinations of a stage: the JSON lines, and those of `--log`; see
    `Writer.open`."""
    writers = [
        JsonLines(config, stage),
        *(DESTINATIONS[name](config, stage) for name in config.log),
    ]
    for writer in writers:
        writer.open(is_new)
    return writers


def close_writers(writers: Sequence[Writer]) -> None:
    """Closes log destinations that a run which ended early may have left open."""
    for writer in writers:
        with contextlib.suppress(OSError):
            writer.close()


class JsonLines(Writer):
    """A writer of one JSON object per line. NAME.jsonl holds the metrics, which are reproducible,
    and NAME_speed.jsonl holds the training speed, which is not."""

    def __init__(self, config: Config, stage: str):
        self._folder = folder = config.folder / "metrics"
        self._paths = {False: folder / f"{stage}.jsonl", True: folder / f"{stage}_speed.jsonl"}
        self._unwritten = dict.fromkeys(self._paths.values(), "")
        self._sizes = dict.fromkeys(self._unwritten, 0)

    def resume(self, step: int) -> None:
        for path in self._unwritten:
            content = path.read_bytes() if path.exists() else b""
            for row, end in parse_rows(content):
                if row["step"] > step or content[end - 1 : end] != b"\n":
                    break
                self._sizes[path] = end
            if len(content) > self._sizes[path]:
                os.truncate(path, self._sizes[path])

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        speed = group == "speed"
        row = {"step": step} | ({} if speed else {"split": group}) | values
        self._unwritten[self._paths[speed]] += json.dumps(row) + "\n"
        self.close()

    def close(self) -> None:
        """Writes all buffered rows, including those that an earlier call could not write."""
        for path, text in self._unwritten.items():
            if not text:
                continue
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                size = min(self._sizes[path], os.fstat(file.fileno()).st_size)
                file.truncate(size)  # drop a partly written row
                file.write(text.encode())
            self._sizes[path], self._unwritten[path] = size + len(text.encode()), ""


def parse_rows(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the rows of JSON lines up to the first damaged line, each with its end offset."""
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        end += len(line)
        yield row, end


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines, up to the first damaged line."""
    return [row for row, _ in parse_rows(path.read_bytes())] if path.exists() else []


class TensorBoard(Writer):
    """A writer of TensorBoard event files. It uses tensorboardX's synchronous record writer,
    because the thread of SummaryWriter dies on a full disk and the next call then blocks forever.
    """

    def __init__(self, config: Config, stage: str):
        self._folder = config.folder / "tensorboard" / stage
        self._records: RecordWriter | None = None
        self._start: int | None = None  # the step to resume from, until an event records it

    def _write(self, step: int, **content: Any) -> None:
        """Writes an event, after those that must precede it."""
        events = [event_pb2.Event(wall_time=time.time(), step=step, **content)]
        if self._start is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            events.insert(0, event_pb2.Event(step=self._start + 1, session_log=start))
        try:
            if self._records is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
                self._records = RecordWriter(str(self._folder / name))
                events.insert(0, event_pb2.Event(file_version="brain.Event:2"))
            for event in events:
                self._records.write(event.SerializeToString())
            self._records.flush()
            self._start = None
        except OSError:
            # The file may end with a partly written event: write the next event to a new file.
            records, self._records = self._records, None
            with contextlib.suppress(OSError):
                if records is not None:
                    records.close()
            raise

    def resume(self, step: int) -> None:
        self._start = step  # written together with the next event

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        scalars = [
            summary_pb2.Summary.Value(tag=f"{group}/{key}", simple_value=value)
            for key, value in values.items()
        ]
        self._write(step, summary=summary_pb2.Summary(value=scalars))

    def text(self, step: int, name: str, text: str) -> None:
        self._write(step, summary=summary.text(name, text))

    def image(self, step: int, name: str, file: Path) -> None:
        with Image.open(file) as picture:
            width, height, channels = *picture.size, len(picture.getbands())
        image = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=file.read_bytes()
        )
        value = summary_pb2.Summary.Value(tag=f"figures/{name}", image=image)
        self._write(step, summary=summary_pb2.Summary(value=[value]))

    def close(self) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None


class Service(Writer):
    """A writer to Weights & Biases or trackio, whose interfaces are nearly the same.

    A service cannot discard what it received. Therefore a file holds the id and the name of the run
    there, and the last step that was sent of each group. A run that resumes from an earlier step
    continues the run there, and leaves out what it sent before: it would be the same.
    """

    def __init__(self, service: str, config: Config, stage: str):
        self._service, self._module = service, importlib.import_module(service)
        self._config, self._stage = config, stage
        self._file = config.folder / "metrics" / f"{stage}_{service}.json"
        self._state: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._service

    @contextlib.contextmanager
    def _convert_errors(self, kind: Callable[[str], Exception]) -> Iterator[None]:
        """Raises `kind` in place of the exceptions of the service."""
        own_error = getattr(self._module, "Error", RuntimeError)
        try:
            yield
        except (own_error, OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise kind(f"{self._service}: {reason}.") from error

    def open(self, is_new: bool) -> None:
        with self._convert_errors(UserError):
            if is_new or not self._file.exists():
                run_id = secrets.token_hex(4)
                name = f"{self._config.folder.name} {self._stage} {run_id}"
                self._state = {"id": run_id, "name": name, "steps": {}}
            else:
                self._state = json.loads(self._file.read_text(encoding="utf-8"))
            shared: dict[str, Any] = {
                "project": PROJECT, "name": self._state["name"], "resume": "allow",
                "config": to_dict(remove_machine_settings(self._config)),
            }  # fmt: skip
            if self._service == "wandb":
                self._config.folder.mkdir(parents=True, exist_ok=True)
                self._run = self._module.init(
                    **shared, id=self._state["id"], dir=self._config.folder, reinit="create_new",
                    settings=self._module.Settings(console="off"),
                )  # fmt: skip
                self._finish = self._run.finish
            else:
                self._run = self._module.init(**shared, embed=False)
                self._finish = self._module.finish  # also forgets the run, unlike that of the run

    def _send(self, step: int, group: str, values: dict[str, Any]) -> None:
        if step <= self._state["steps"].get(group, 0):
            return
        with self._convert_errors(OSError):
            self._run.log(values, step=step)
        self._state["steps"][group] = step
        self._file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self._file, json.dumps(self._state).encode())

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        self._send(step, group, {f"{group}/{key}": value for key, value in values.items()})

    def image(self, step: int, name: str, file: Path) -> None:
        name = f"figures/{name}"
        self._send(step, name, {name: self._module.Image(str(file))})

    def close(self) -> None:
        if self._run is not None:
            with self._convert_errors(OSError):
                self._finish()
            self._run = None


SERVICES = ("wandb", "trackio")
DESTINATIONS: dict[str, Callable[[Config, str], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": functools.partial(Service, "wandb"),
    "trackio": functools.partial(Service, "trackio"),
}
