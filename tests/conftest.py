"""Four devices on any machine, set before JAX starts; tests that want one say so. And programs
compiled quickly, and kept in one place: most of a small run's time is compilation, and many are
compiled again. `XLA_FLAGS=--xla_backend_optimization_level=3` has them compiled as users have them.
"""

import gc
import os
import resource
import shutil
import signal
import tempfile

import pytest
from filelock import FileLock

from tests import commands

os.environ["XLA_FLAGS"] = " ".join(  # the last one counts
    ["--xla_force_host_platform_device_count=4", commands.QUICK, os.environ.get("XLA_FLAGS", "")]
)

# Before numpy is imported: threads of its BLAS that wait for cores which the other tests hold made
# products of matrices 60 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the processes that run tests inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="taming_jax-test-cache-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# What JAX and Flax note of where an operation comes from, for messages and profiles, costs time.
os.environ.setdefault("FLAX_PROFILE", "false")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Tracing makes so many objects that looking for garbage among them takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)

LONGEST = [
    "test_torture", "test_pictures", "test_decoding", "test_compvis", "test_prior", "test_resume",
    "test_vqgan_step", "test_distributed", "test_sample", "test_weights", "test_report",
    "test_features", "test_precision", "test_devices", "test_run", "test_bad_input",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, so that no core is left alone with one of them at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def own_sigint():
    """The handler of SIGINT that commands run in this process replace."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def limited():
    """A bound on the size of files, at which a write ends half done, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


TINY = [
    "--config", "mnist_tiny", "--data.name", "synthetic", "--data.image-size", "16",
    "--vqgan.channels", "4", "--vqgan.multipliers", "1", "2", "--vqgan.batch-size", "8",
    "--vqgan.discriminator-start", "1", "--vqgan.adaptive-weight", "--vqgan.steps",
]  # fmt: skip


def make_once(tmp_path_factory, name, make):
    """A folder that the first process of the test run to need it makes, for all of them."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / f"shared-{name}", base / f"shared-{name}.done"
    with FileLock(base / f"shared-{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """The folder of a small run that has stage 1 only. Copy it to write in it."""

    def make(workdir):
        line = ("train_vqgan.py", *TINY, 3, "--workdir", workdir, "--devices", 1)
        status, _, err = commands.run_here(*line, draw=False)
        assert status == 0, err

    return make_once(tmp_path_factory, "stage1", make)


@pytest.fixture(scope="session")
def both(stage1, tmp_path_factory):
    """The folder of a small run of both stages. Copy it to write in it."""

    def make(workdir):
        shutil.copytree(stage1, workdir, dirs_exist_ok=True)
        status, _, err = commands.run_here(
            "train_prior.py", "--config", "mnist_tiny", "--workdir", workdir, "--devices", 1,
            "--prior.batch-size", 8, "--prior.steps", 2, "--prior.layers", 1,
        )  # fmt: skip
        assert status == 0, err

    return make_once(tmp_path_factory, "both", make)
