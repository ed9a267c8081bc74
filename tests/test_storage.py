import errno
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from taming_jax.errors import UserError
from taming_jax.storage import (
    atomic_write,
    cache_arrays,
    create_run_folders,
    folder_lock,
    read_arrays,
    user_cache,
)
from tests import commands


def test_a_failed_write_leaves_the_old_file(tmp_path, limit_file_size):
    file = tmp_path / "file"
    atomic_write(file, b"old")
    limit_file_size(50)
    with pytest.raises(OSError, match="too large"):
        atomic_write(file, bytes(100))
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    limit_file_size(100)
    atomic_write(file, bytes(100))
    assert file.read_bytes() == bytes(100)


HOLDER = """
import sys, time
from pathlib import Path
from taming_jax.storage import folder_lock

with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=commands.ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                UserError, match=rf"process {holder.pid} on {socket.gethostname()} is tr"
            ),
            folder_lock(folder),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder_lock(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert list(folder.iterdir()) == []


def test_locks_of_folders_are_independent_and_released_at_the_end(tmp_path):
    with folder_lock(tmp_path / "a"), folder_lock(tmp_path / "b"):
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on"),
            folder_lock(tmp_path / "a"),
        ):
            pass
        # A refused attempt did not release the lock.
        with pytest.raises(UserError), folder_lock(tmp_path / "a"):
            pass
        (tmp_path / "b" / "config.json").write_text("{}")
    assert list(tmp_path.rglob("*")) == [tmp_path / "b", tmp_path / "b" / "config.json"]
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "c" / "d"):
        raise ZeroDivisionError
    assert not (tmp_path / "c").exists()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def raise_no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", raise_no_locks)
    with folder_lock(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert "does not support locks (No locks available)" in capsys.readouterr().out


def test_arrays_are_written_if_there_is_space_and_damaged_files_are_ignored(
    tmp_path, limit_file_size
):
    file = tmp_path / "new" / "arrays.npz"
    arrays = {"a": np.arange(5000), "b": np.ones((2, 3), np.float32)}
    cache_arrays(file, arrays)
    stored = read_arrays(file)
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name], array)
    content = file.read_bytes()
    limit_file_size(1000)
    cache_arrays(tmp_path / "other.npz", arrays)
    assert not (tmp_path / "other.npz").exists()
    assert read_arrays(tmp_path / "other.npz") is None
    for damaged in (content[: len(content) // 2], content[:300] + b"x" + content[301:], b""):
        (tmp_path / "damaged.npz").write_bytes(damaged[:1000])
        assert read_arrays(tmp_path / "damaged.npz") is None


def test_a_user_without_a_home_has_a_cache(tmp_path, monkeypatch):
    import pwd

    def raise_key_error(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", raise_key_error)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = user_cache()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert user_cache() == folder
    monkeypatch.setattr("os.getuid", lambda: 12345)
    folder.rename(tmp_path / "taming_jax-12345")
    with pytest.raises(UserError, match="belongs to another user; set XDG_CACHE_HOME"):
        user_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(user_cache()) == "/elsewhere/taming_jax"


def test_a_workdir_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not valid UTF-8, which Orbax requires"):
        create_run_folders(tmp_path / os.fsdecode(b"caf\xe9"))
    assert not list(tmp_path.iterdir())
