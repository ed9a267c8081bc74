"""Where the rows of a log go: JSON lines, which a run needs, and other destinations."""

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
        """Hides what was logged after a step: the run goes on from there, and logs it again."""

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """A file of JSON objects, one per line. `rows` are those up to step `start`, after which the
    file is cut."""

    def __init__(self, path: Path, start: int):
        self.path, self.rows = path, []
        self._waiting: list[str] = []
        self._size = 0
        content = path.read_bytes() if path.exists() else b""
        for row, end in whole_rows(content):
            if row["step"] > start or content[end - 1 : end] != b"\n":
                break
            self.rows.append(row)
            self._size = end
        if len(content) > self._size:
            os.truncate(path, self._size)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row. Raises OSError where it could not be written: it is written with the next."""
        self.rows.append(row)
        self._waiting.append(json.dumps(row) + "\n")
        self.flush()

    @property
    def complete(self) -> bool:
        """Whether every row is in the file."""
        return not self._waiting

    def flush(self) -> None:
        """Writes what could not be written before."""
        content = "".join(self._waiting).encode()
        if not content:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            size = min(self._size, os.fstat(file.fileno()).st_size)
            file.truncate(size)  # without what was written of a row in part
            file.write(content)
        self._size, self._waiting = size + len(content), []


def whole_rows(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of JSON lines, up to the first damaged line, each with the place where its line
    ends."""
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
    return [row for row, _ in whole_rows(path.read_bytes())] if path.exists() else []


class TensorBoard:
    """Writes event files into a folder, with tensorboardX's synchronous writer of records: a thread
    that a full disk ends would be waited for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._records: RecordWriter | None = None
        self._start: int | None = None  # where a run goes on, until that is written

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
            # The file may end in part of an event: the next one goes to another.
            records, self._records = self._records, None
            with contextlib.suppress(OSError):
                if records is not None:
                    try:
                        records.close()
                    finally:
                        if not os.path.getsize(records.path):
                            os.unlink(records.path)
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
