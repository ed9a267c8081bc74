"""Where the metrics of a run go: destinations are classes like `Writer`, in `open_writers`."""

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
    """A log destination of one stage. Its methods raise OSError where something could not be
    written, and are called again with what comes next."""

    def resume(self, step: int) -> None:
        """Discards what was logged after a step: the run resumes there, and logs it again. This is
        also called for a new run, with step 0."""

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Logs the metrics of a step, whose names may differ from step to step. `group` is "train",
        "validation" or "speed"."""

    def close(self) -> None:
        """Writes what is left."""


def open_writers(folder: Path, name: str) -> list[Writer]:
    """The log destinations of a stage in a run's folder."""
    return [JsonLines(folder / "metrics", name), TensorBoard(folder / "tensorboard" / name)]


class JsonLines:
    """One JSON object per line: NAME.jsonl holds the metrics, which are the same whenever and
    wherever a run is computed, and NAME_speed.jsonl how fast that was."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._paths = {False: folder / f"{name}.jsonl", True: folder / f"{name}_speed.jsonl"}
        self._unwritten = dict.fromkeys(self._paths.values(), "")
        self._sizes = dict.fromkeys(self._unwritten, 0)

    def resume(self, step: int) -> None:
        for path in self._unwritten:
            content = path.read_bytes() if path.exists() else b""
            for row, end in complete_rows(content):
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
        """Writes all rows, including those that could not be written before."""
        for path, rows in self._unwritten.items():
            if not rows:
                continue
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                size = min(self._sizes[path], os.fstat(file.fileno()).st_size)
                file.truncate(size)  # without the part of a row that was written
                file.write(rows.encode())
            self._sizes[path], self._unwritten[path] = size + len(rows.encode()), ""


def complete_rows(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of JSON lines up to the first damaged line, each with the position of its end."""
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
    """The rows of a file of JSON lines, up to the first damaged one."""
    return [row for row, _ in complete_rows(path.read_bytes())] if path.exists() else []


class TensorBoard:
    """Event files in a folder, by tensorboardX's synchronous writer of records: its SummaryWriter's
    thread dies on a full disk, and the next call then waits for it forever."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._records: RecordWriter | None = None
        self._start: int | None = None  # the step to resume from, until that is written

    def _write(self, step: int, **content: Any) -> None:
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
            # The file may end in part of an event: the next one goes to another file.
            records, self._records = self._records, None
            with contextlib.suppress(OSError):
                if records is not None:
                    records.close()
            raise

    def resume(self, step: int) -> None:
        self._start = step  # written with what comes next

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        parts = [
            summary_pb2.Summary.Value(tag=f"{group}/{key}", simple_value=value)
            for key, value in values.items()
        ]
        self._write(step, summary=summary_pb2.Summary(value=parts))

    def close(self) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None
