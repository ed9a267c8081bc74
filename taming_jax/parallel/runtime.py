"""Configures JAX before it starts: deterministic GPU operations and the compilation cache."""

import hashlib
import os

import jax

try:
    from jax._src.xla_bridge import backends_are_initialized
except ImportError:  # this JAX lacks the private function; assume that it has not started

    def backends_are_initialized() -> bool:
        return False


from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.parallel import distributed
from taming_jax.storage import user_cache

# Implies --xla_gpu_exclude_nondeterministic_ops and disables autotuning (openxla/xla 12520).
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
MAX_CACHE_BYTES = 2**30
MIN_COMPILE_SECONDS = 0.5  # faster compilations are not cached


def prepare(config: Config) -> None:
    """Configures JAX as a config requires. Raises UserError if the config is deterministic, but JAX
    has already started, or if JAX uses 64-bit types."""
    if jax.config.values["jax_enable_x64"]:
        raise UserError(
            "JAX's 64-bit types are not supported; unset JAX_ENABLE_X64 (jax_enable_x64)."
        )
    if config.deterministic:
        enable_determinism()
    if config.compile_cache:
        enable_compile_cache()


def enable_determinism() -> None:
    """Makes XLA use only deterministic operations on GPUs. Raises UserError if JAX has already
    started."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC in flags.split():
        return
    if backends_are_initialized():
        raise UserError(
            "--deterministic must be set before JAX starts, but JAX has already started; start a "
            "new process (in a notebook, restart the kernel)."
        )
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()


def enable_compile_cache() -> None:
    """Caches compiled programs in the user's own cache folder, unless JAX already has a cache."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = user_cache() / f"xla-{get_machine_key()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return  # JAX would warn about each program that it cannot cache
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    if jax.__version_info__ >= (0, 12):  # with 0.10, a limit fails for users without a home folder
        jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)


def get_machine_key() -> str:
    """Returns a name for the machine properties that affect compiled programs but are not part of
    JAX's cache keys: the CPU model, and the number of cores that this process may use, among which
    a CPU program divides its work, so that rounding depends on it."""
    properties = f"{distributed.hash_cpu()} {distributed.count_cores()}"
    key = hashlib.sha256(properties.encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-{key}"
