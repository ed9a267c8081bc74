"""What is decided before JAX starts: determinism, and the cache of compiled programs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.parallel import runtime
from taming_jax.parallel.runtime import prepare
from taming_jax.training.checkpoints import Store
from tests import commands
from tests.conftest import TINY


def test_a_user_s_own_cache_is_left_alone():
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

def compiled():
    hits.clear()
    jax.clear_caches()
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
    return len(hits)

prepare(load_config("mnist_tiny", {"compile_cache": False}))
assert compiled() == 0 and not jax.config.jax_compilation_cache_dir
prepare(load_config("mnist_tiny"))
(folder,) = [Path(jax.config.jax_compilation_cache_dir)]
print(folder)
assert compiled() == 0 and compiled() > 0
prepare(load_config("mnist_tiny"))
assert compiled() > 0
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


def test_determinism_is_decided_before_jax_starts():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC], cwd=commands.ROOT, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("--deterministic must be set before JAX starts")


def without_a_cache(home):
    """The environment of a user whose cache folder is `home`."""
    own = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    return own | {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def test_programs_are_kept_in_the_user_s_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=commands.ROOT, env=without_a_cache(tmp_path),
        text=True, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path / "taming_jax" and folder.name.startswith("xla-jax-")
    assert folder.stat().st_mode & 0o077 == 0, "programs of others would be run"


@pytest.mark.slow
def test_a_run_of_kept_programs_is_the_same_bit_for_bit(stage1, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", without_a_cache(tmp_path / "cache"))
    expected = Store(stage1, "vqgan").read(3).arrays
    kept = []
    for name in ("cold", "warm"):
        # On one of four devices, as the tests' process: XLA rounds by how many there are.
        line = ("train_vqgan.py", *TINY, 3, "--workdir", tmp_path / name, "--devices", 1)
        status, _, err = commands.run(*line, devices=4)
        assert status == 0, err
        arrays = Store(tmp_path / name, "vqgan").read(3).arrays
        assert set(arrays) == set(expected) and len(arrays) > 100
        for path, array in expected.items():
            np.testing.assert_array_equal(arrays[path], array, err_msg=".".join(path))
        kept.append(sorted((tmp_path / "cache").rglob("*step*")))
    assert kept[0] == kept[1] and kept[0], "the second run compiled no step"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be counted")
def test_another_number_of_cores_is_another_machine(monkeypatch):
    """XLA divides a program for the CPU among them when it compiles it, and rounds accordingly."""
    here = runtime.get_machine_key()
    assert here == runtime.get_machine_key() and jax.__version__ in here
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)))
    assert runtime.get_machine_key() != here


def test_a_jax_without_its_private_module_trains_all_the_same(monkeypatch):
    """It cannot say whether it has started."""
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", None)
    monkeypatch.setattr(os, "environ", os.environ | {"XLA_FLAGS": "--one"})
    importlib.reload(runtime)  # as where it is imported first
    runtime.prepare(load_config("mnist_tiny", {"deterministic": True}))
    assert os.environ["XLA_FLAGS"] == "--one --xla_gpu_deterministic_ops=true"
