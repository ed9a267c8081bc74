"""A small disk for a test, which can be filled or made read-only."""

import contextlib
import os
import subprocess
from pathlib import Path


class NoDisk(Exception):
    """An error that is raised if no disk can be mounted, with the reason."""


class Disk:
    """A mounted disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Fills the disk except for `leave` bytes, even while other programs write to it."""
        with self._filler.open("wb") as file:
            while True:
                stats = os.statvfs(self.folder)
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - leave)
                    break

    def free(self) -> None:
        self._filler.unlink()

    def set_read_only(self, read_only: bool) -> None:
        mode = "ro" if read_only else "rw"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], check=True)


@contextlib.contextmanager
def mount(folder: Path, mebibytes: int = 8):
    """Mounts a disk at a folder. Raises NoDisk if mounting is not possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise NoDisk("there is no mount command") from None
    if result.returncode:
        raise NoDisk(f"mounting is not possible here ({result.stderr.strip()})")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
