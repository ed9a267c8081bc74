"""Files that a full disk or a kill leaves whole or as they were, and folders that one process at a
time works in."""

import contextlib
import errno
import hashlib
import io
import json
import os
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import filelock
import numpy as np

from taming_jax.errors import UserError, say

LOCK = ".lock"


def user_cache() -> Path:
    """The user's own folder for what may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "taming_jax"


def check_writable(name: str, place: Path) -> None:
    """UserError, before the work is done, where a file cannot be written, or what is in a folder;
    `name` is the setting that names it."""
    try:
        with tempfile.TemporaryFile(dir=place if place.is_dir() else place.absolute().parent):
            pass
        if place.is_file():
            place.open("r+b").close()
    except OSError as error:
        raise UserError(
            f"{name} {place} cannot be written ({error.strerror}); choose another place."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file beside a place, to be written: whole, it gets its name there; where anything fails
    (OSError, of a full disk), what was there stays, and nothing is left that holds space."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # on the disk before it has its name
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keeps arrays that can be had again, as an .npz; a disk that does not take them keeps none."""
    content = io.BytesIO()
    np.savez(content, **cast(dict[str, Any], arrays))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` kept; None where there is nothing, or nothing whole."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            return {name: content[name] for name in content}
    except (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error):
        return None


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads from training in a run's folder. The folder is made where
    it is missing, and removed afterwards where nothing was put into it. The lock ends with its
    process, however that ends.

    Raises UserError where another process holds the lock, or the folder cannot be written.
    """
    file = folder.absolute() / LOCK
    lock = filelock.FileLock(file, blocking=False)
    created = [place for place in file.parents if not place.exists()]
    with writable(folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            holder = file.read_text(errors="replace") or "another process"
            raise UserError(
                f"{holder} trains in {folder}; wait for it, stop it, or choose another --workdir."
            ) from error
        except (OSError, NotImplementedError) as error:
            number = getattr(error, "errno", errno.ENOSYS)
            if number not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
            say(
                f"The file system of {folder} has no locks ({os.strerror(number)}): nothing keeps "
                "a second run out of the folder."
            )
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock is held all the same
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            file.unlink()
            for place in created:
                place.rmdir()
        lock.release()


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """UserError in place of OSError where a run's folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the workdir {folder} cannot be written ({error.filename}: {error.strerror}); choose "
            "another --workdir."
        ) from error


def usable(folder: Path) -> None:
    """Makes the folders that a run writes in. UserError where one of them, or the config, cannot be
    written."""
    with writable(folder):
        for name in ("checkpoints", "metrics", "figures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder / name).close()
        if (folder / "config.json").exists():
            (folder / "config.json").open("a").close()


def text_hash(content: Any) -> str:
    """A hash of something JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
