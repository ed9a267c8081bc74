"""Atomic writes, which a full disk or a killed process cannot corrupt, and locks of run folders."""

import contextlib
import errno
import hashlib
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


def expand_user(path: str | Path) -> Path:
    """Replaces a leading ~ with the user's home folder, if there is one."""
    return Path(os.path.expanduser(path))


def user_cache() -> Path:
    """Returns the user's cache folder, whose files may be deleted at any time. If the user has no
    home folder, it is in the folder for temporary files. Raises UserError if it belongs to another
    user."""
    base = expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.is_absolute():
        return base / "taming_jax"
    folder = Path(tempfile.gettempdir()) / f"taming_jax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"the cache folder {folder} belongs to another user; set XDG_CACHE_HOME.")
    return folder


def check_writable(name: str, path: Path) -> None:
    """Raises UserError if a file, or files in a folder, cannot be written, so that a command fails
    before it does its work. `name` is the setting that holds the path."""
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.absolute().parent):
            pass
        if path.is_file():
            path.open("r+b").close()
    except OSError as error:
        raise UserError(
            f"{name} {path} cannot be written ({error.strerror}); choose another path."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path` to write to, and renames it to `path` on success. If
    anything fails, removes it and leaves `path` unchanged. Raises OSError, for example on a full
    disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # so that the content reaches the disk before the rename
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all. Raises OSError if it cannot be written."""
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays to an .npz file, completely or not at all. Raises OSError if it cannot be
    written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **cast(dict[str, Any], arrays))


def cache_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays like `write_arrays`, but does nothing if they cannot be written."""
    with contextlib.suppress(OSError):
        write_arrays(path, arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of an .npz file, or None if it is missing or damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            return {name: content[name] for name in content}
    except (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error):
        return None


@contextlib.contextmanager
def folder_lock(folder: Path, work: str = "training", flag: str = "--workdir") -> Iterator[None]:
    """Locks a folder, so that no other process or thread writes to it. Creates the folder if it is
    missing, and removes it afterwards if it is empty. The operating system releases the lock if the
    process dies.

    Raises UserError if another process holds the lock, or if the folder cannot be written. `work`
    and `flag` are what the process does and where the user named the folder, for messages.
    """
    file = folder.absolute() / LOCK
    lock = filelock.FileLock(file, blocking=False)
    created = [parent for parent in file.parents if not parent.exists()]
    with report_unwritable(folder, flag):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            holder = file.read_text(errors="replace") or "another process"
            raise UserError(
                f"{holder} is {work} in {folder}; wait for it, stop it, or choose another {flag}."
            ) from error
        except (OSError, NotImplementedError) as error:
            number = getattr(error, "errno", errno.ENOSYS)
            if number not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
            say(
                f"The file system of {folder} does not support locks ({os.strerror(number)}): make "
                f"sure that no other process is {work} in the folder."
            )
    try:
        with contextlib.suppress(OSError):  # the lock works even if a full disk rejects its text
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with contextlib.suppress(OSError):  # `rmdir` keeps folders that are not empty
            file.unlink()
            for parent in created:
                parent.rmdir()
        lock.release()


@contextlib.contextmanager
def report_unwritable(folder: Path, flag: str = "--workdir") -> Iterator[None]:
    """A context for writing a folder that converts OSError to UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the {flag.removeprefix('--')} {folder} cannot be written ({error.filename}: "
            f"{error.strerror}); choose another {flag}."
        ) from error


def create_run_folders(folder: Path) -> None:
    """Creates the folders that a run writes to. Raises UserError if one of them, or the config,
    cannot be written, or if the path is not UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the path {folder} is not valid UTF-8, which Orbax requires; choose another --workdir."
        ) from error
    with report_unwritable(folder):
        for name in ("checkpoints", "metrics", "figures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder / name).close()
        if (folder / "config.json").exists():
            (folder / "config.json").open("a").close()


def hash_json(content: Any) -> str:
    """Returns the SHA-256 hash of a JSON-serializable value, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
