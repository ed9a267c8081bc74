"""Files that a full disk or a kill leaves whole or as they were."""

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: beside its place, then renamed. Raises OSError, and then
    leaves nothing that holds space."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it has its name
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


class Appended:
    """A file that grows at its end, never by a part of a piece: what the disk does not take is
    kept (`waiting`), and written with what comes next."""

    def __init__(self, path: Path):
        self.path = path
        self._size = path.stat().st_size if path.exists() else 0
        self.waiting = b""

    def add(self, piece: bytes) -> None:
        """Keeps bytes for the next `flush`."""
        self.waiting += piece

    def flush(self) -> None:
        """Writes what is kept. Raises OSError, and then keeps it."""
        if not self.waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            self._cut(file.fileno())  # of what could not be cut then
            try:
                rest = memoryview(self.waiting)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._cut(file.fileno())
                raise
            self._size, self.waiting = os.fstat(file.fileno()).st_size, b""

    def _cut(self, descriptor: int) -> None:
        """Takes a part of a piece off the end. On a full disk too: that needs no room."""
        if os.fstat(descriptor).st_size > self._size:
            os.ftruncate(descriptor, self._size)
