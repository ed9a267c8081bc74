"""How JAX is set up before it starts: deterministic GPUs, and a cache of compiled programs."""

import contextlib
import hashlib
import importlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.files import user_cache, write_whole

# Implies --xla_gpu_exclude_nondeterministic_ops, and switches autotuning off (openxla/xla 12520).
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
LARGEST = 2**30  # bytes of compiled programs that are kept
WORTH = 0.5  # seconds of compilation that are worth a file


def internals(module: str) -> Any:
    """A module of JAX that is not public; None in a version that does not have it."""
    try:
        return importlib.import_module(f"jax._src.{module}")
    except ImportError:
        return None


def prepare(config: Config) -> None:
    """Sets JAX up to train as a config says. UserError where it has started, and it is too late."""
    if config.deterministic:
        be_deterministic()
    if config.compile_cache:
        keep_programs()


def be_deterministic() -> None:
    """Has XLA compile for GPUs only what gives the same numbers in every run."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC in flags.split():
        return
    # Without this private function it is not known whether JAX has started; assume it has not.
    if getattr(internals("xla_bridge"), "backends_are_initialized", lambda: False)():
        raise UserError(
            "--deterministic is decided before JAX starts, and JAX has run in this process; begin "
            "a new one (in a notebook, restart the kernel)."
        )
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()


def keep_programs() -> None:
    """Keeps compiled programs in the user's own cache folder, unless JAX has one already: theirs,
    or that of an earlier call. A version of JAX that has no place for our way of it keeps none."""
    cache = internals("compilation_cache")
    if jax.config.values["jax_compilation_cache_dir"] or not hasattr(cache, "get_file_cache"):
        return
    jax.config.update("jax_compilation_cache_dir", str(user_cache() / f"xla-{machine()}"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
    cache.get_file_cache = lambda path: (WholeEntries(Path(path)), path)


def machine() -> str:
    """A name for what compiled programs depend on besides what jax has in their keys: the kind of
    CPU, and the cores this process may use, among which a program for the CPU divides its work (and
    rounds accordingly)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = ("model name", "flags", "CPU part", "Features")  # of x86-64, then of Arm
        kind = sorted({line for line in lines if line.startswith(names)})
    except OSError:
        kind = [platform.machine(), platform.processor()]
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count()
    found = hashlib.sha256("\n".join([*kind, str(cores)]).encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-{found}"


class WholeEntries:
    """jax's cache of compiled programs in a folder. Its own is written in place, and never again: a
    kill, a full disk or two processes leave an entry torn for good. Here one appears whole, with
    its hash; one that is not what was written is as none, and written anew."""

    def __init__(self, path: Path):
        self._path = path

    def get(self, key: str) -> bytes | None:
        """An entry; None where there is none, or it is damaged."""
        file = self._path / key
        try:
            content = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        value, claimed = content[:-32], content[-32:]
        return value if hashlib.sha256(value).digest() == claimed else None

    def put(self, key: str, value: bytes) -> None:
        """Keeps an entry, where the disk takes it."""
        with contextlib.suppress(OSError):
            self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self._path / key, value + hashlib.sha256(value).digest())
            self._trim()

    def _trim(self) -> None:
        """Deletes what was used least recently, by any version, above a size of all."""
        files = {file: file.stat() for file in self._path.parent.glob("xla-*/*") if file.is_file()}
        size = sum(found.st_size for found in files.values())
        for file in sorted(files, key=lambda file: files[file].st_mtime):
            if size <= LARGEST:
                break
            file.unlink(missing_ok=True)
            size -= files[file].st_size
