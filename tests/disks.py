"""A small disk of a test's own, to fill it or to make it read-only."""

import contextlib
import os
import subprocess
from pathlib import Path


class NoDisk(Exception):
    """No disk can be had here, for the reason that is said."""


class Disk:
    def __init__(self, folder: Path):
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Leaves room for that many bytes, of what others who write at the time leave."""
        with self._filler.open("wb") as file:
            while True:
                found = os.statvfs(self.folder)
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - leave)
                    break

    def free(self) -> None:
        self._filler.unlink()

    def read_only(self, yes: bool) -> None:
        mode = "ro" if yes else "rw"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], check=True)


@contextlib.contextmanager
def mounted(folder: Path, mebibytes: int = 8):
    """A disk at a folder. NoDisk where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise NoDisk("there is no mount command") from None
    if done.returncode:
        raise NoDisk(f"none can be mounted here ({done.stderr.strip()})")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
