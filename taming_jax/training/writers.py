"""Metric writers. To add a destination, write a class with the methods of `Writer`, and add it to
`open_writers`."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter


class Writer(Protocol):
    """A destination for the metrics of one stage. Methods raise OSError if they cannot write; the
    run continues, and calls them again for the next metrics."""

    def resume(self, step: int) -> None:
        """Discards the rows after `step`: the run resumes from there and logs them again. A new run
        calls this with step 0."""

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Writes the metrics of a step. Their names may differ between steps. `group` is "train",
        "validation", or "speed"."""

    def close(self) -> None:
        """Writes any buffered metrics and closes the destination."""


def open_writers(folder: Path, name: str) -> list[Writer]:
    """Opens the metric writers of a stage in a run's folder."""
    return [JsonLines(folder / "metrics", name), TensorBoard(folder / "tensorboard" / name)]


class JsonLines:
    """A writer of one JSON object per line. NAME.jsonl holds the metrics, which are reproducible,
    and NAME_speed.jsonl holds the training speed, which is not."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._paths = {False: folder / f"{name}.jsonl", True: folder / f"{name}_speed.jsonl"}
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


class TensorBoard:
    """A writer of TensorBoard event files. It uses tensorboardX's synchronous record writer,
    because the thread of SummaryWriter dies on a full disk and the next call then blocks forever.
    """

    def __init__(self, folder: Path):
        self._folder = folder
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

    def close(self) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None
