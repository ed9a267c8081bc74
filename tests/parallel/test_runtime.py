"""Tests of what is configured before JAX starts: determinism, and the cache of compiled
programs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.errors import UserError
from taming_jax.parallel import runtime
from taming_jax.parallel.runtime import prepare
from taming_jax.training.checkpoints import Store
from tests import commands
from tests.conftest import TINY


def test_a_cache_that_the_user_has_set_is_kept():
    before = jax.config.jax_compilation_cache_dir
    assert before == os.environ["JAX_COMPILATION_CACHE_DIR"]
    prepare(load_config("mnist_tiny"))
    assert jax.config.jax_compilation_cache_dir == before


PROGRAM = """
import os
import warnings
from pathlib import Path

warnings.simplefilter("error")
import jax
import jax.numpy as jnp
from taming_jax.config.load import load_config
from taming_jax.parallel.runtime import prepare

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
)

def count_hits():
    hits.clear()
    jax.clear_caches()
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
    return len(hits)

prepare(load_config("mnist_tiny", {"compile_cache": False}))
assert count_hits() == 0 and not jax.config.jax_compilation_cache_dir
prepare(load_config("mnist_tiny"))
(folder,) = [Path(jax.config.jax_compilation_cache_dir)]
print(folder)
assert count_hits() == 0 and count_hits() > 0
prepare(load_config("mnist_tiny"))
assert count_hits() > 0
"""


DETERMINISTIC = """
import os
import tempfile
import taming_jax.training.loop
import taming_jax.training.prior
import taming_jax.training.vqgan
from taming_jax.config.load import load_config
from taming_jax.errors import UserError
from taming_jax.parallel.runtime import prepare

class Reached(Exception):
    pass

def build(config, devices, restart):
    raise Reached

config = load_config("mnist_tiny", {"deterministic": True, "workdir": tempfile.mkdtemp()})
before = os.environ["XLA_FLAGS"]
prepare(load_config("mnist_tiny"))
assert os.environ["XLA_FLAGS"] == before
try:
    taming_jax.training.loop.train(build, config)
except Reached:
    pass
assert os.environ["XLA_FLAGS"] == before + " --xla_gpu_deterministic_ops=true"
import jax
assert jax.device_count() == 3
prepare(config)
os.environ["XLA_FLAGS"] = before
try:
    prepare(config)
except UserError as error:
    print(error)
"""


def test_deterministic_must_be_set_before_jax_starts():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    result = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC], cwd=commands.ROOT, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("--deterministic must be set before JAX starts")


def make_environment(home):
    """Returns the environment of a user whose cache folder is `home`."""
    environment = {
        key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
    }
    return environment | {
        "XDG_CACHE_HOME": str(home),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def test_compiled_programs_are_cached_in_the_users_folder(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=commands.ROOT, env=make_environment(tmp_path),
        text=True, capture_output=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    folder = Path(result.stdout.strip())
    assert folder.parent == tmp_path / "taming_jax" and folder.name.startswith("xla-jax-")
    assert folder.stat().st_mode & 0o077 == 0, (
        "others could write programs that this user would run"
    )


@pytest.mark.slow
def test_a_run_with_cached_programs_is_the_same_bit_for_bit(vqgan_workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", make_environment(tmp_path / "cache"))
    expected = Store(vqgan_workdir, "vqgan").read(3).arrays
    cached_files = []
    for name in ("cold", "warm"):
        # One of four devices, as in the process of the tests, because rounding depends on it.
        command = ("train_vqgan.py", *TINY, 3, "--workdir", tmp_path / name, "--devices", 1)
        status, _, err = commands.run(*command, devices=4)
        assert status == 0, err
        arrays = Store(tmp_path / name, "vqgan").read(3).arrays
        assert set(arrays) == set(expected) and len(arrays) > 100
        for path, array in expected.items():
            np.testing.assert_array_equal(arrays[path], array, err_msg=".".join(path))
        cached_files.append(sorted((tmp_path / "cache").rglob("*step*")))
    assert cached_files[0] == cached_files[1] and cached_files[0], "the second run compiled no step"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be counted")
def test_the_machine_key_depends_on_the_number_of_cores(monkeypatch):
    """When XLA compiles a program for the CPU, it divides the work among the cores, which affects
    rounding."""
    machine_key = runtime.get_machine_key()
    assert machine_key == runtime.get_machine_key() and jax.__version__ in machine_key
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)))
    assert runtime.get_machine_key() != machine_key


def test_determinism_works_without_jaxs_private_module(monkeypatch):
    """Without the module, JAX cannot report whether it has started."""
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", None)
    monkeypatch.setattr(os, "environ", os.environ | {"XLA_FLAGS": "--one"})
    importlib.reload(runtime)  # as if it were imported for the first time
    runtime.prepare(load_config("mnist_tiny", {"deterministic": True}))
    assert os.environ["XLA_FLAGS"] == "--one --xla_gpu_deterministic_ops=true"


def test_64_bit_types_are_refused():
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(UserError, match="64-bit types are not supported; unset JAX_ENABLE_X64"):
            prepare(load_config("mnist"))
    finally:
        jax.config.update("jax_enable_x64", False)
