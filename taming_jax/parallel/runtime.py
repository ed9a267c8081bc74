"""How JAX is set up before it starts: deterministic GPUs, and a cache of compiled programs."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

try:
    from jax._src.xla_bridge import backends_are_initialized
except ImportError:  # a version without this private function: it is taken not to have started

    def backends_are_initialized() -> bool:
        return False


from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.storage import user_cache

# Implies --xla_gpu_exclude_nondeterministic_ops, and switches autotuning off (openxla/xla 12520).
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
LARGEST = 2**30  # bytes of compiled programs that are kept
WORTH = 0.5  # seconds of compilation that are worth a file


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
    if backends_are_initialized():
        raise UserError(
            "--deterministic is decided before JAX starts, and JAX has run in this process; begin "
            "a new one (in a notebook, restart the kernel)."
        )
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()


def keep_programs() -> None:
    """Keeps compiled programs in the user's own cache folder, unless JAX has a folder for them
    already."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = user_cache() / f"xla-{machine()}"
    with contextlib.suppress(OSError):  # JAX warns of it
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
    if jax.__version_info__ >= (0, 12):  # with 0.10 a bound fails for users without a home folder
        jax.config.update("jax_compilation_cache_max_size", LARGEST)


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
