"""Settings and fixtures of all tests.

Tests run on four simulated devices, which are configured before JAX starts; tests that need one
device say so. Programs are compiled quickly and cached, because small runs spend most of their time
on compilation and often compile the same programs. To compile as users do, set
`XLA_FLAGS=--xla_backend_optimization_level=3`.
"""

import atexit
import gc
import os
import resource
import shutil
import signal
import tempfile

import pytest
from filelock import FileLock

from tests import commands

os.environ["XLA_FLAGS"] = " ".join(  # the last value of a flag takes precedence
    [
        "--xla_force_host_platform_device_count=4",
        commands.XLA_FLAGS,
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# This must be set before NumPy is imported. If other tests occupy the cores, waiting threads of its
# BLAS make matrix products 60 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # inherited by the test processes
    cache = tempfile.mkdtemp(prefix="taming_jax-test-cache-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Recording the source of each operation, for messages and profiles, takes time.
os.environ.setdefault("FLAX_PROFILE", "false")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Tracing creates so many objects that garbage collection takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)

LONGEST = [
    "test_torture", "test_pictures", "test_decoding", "test_compvis", "test_prior", "test_resume",
    "test_prior_kinds", "test_dispatch", "test_replay",
    "test_vqgan_step", "test_distributed", "test_sample", "test_weights", "test_report",
    "test_features", "test_precision", "test_devices", "test_run", "test_bad_input",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Runs the longest files first, so that none of them runs alone at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def restore_sigint():
    """Restores the handler of SIGINT, which commands that run in this process replace."""
    previous = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def limit_file_size():
    """Returns a function that limits the size of files. Writes beyond the limit are incomplete, as
    on a full disk."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    signal.signal(signal.SIGXFSZ, handler)


TINY = [
    "--config", "mnist_tiny", "--data.name", "synthetic", "--data.image-size", "16",
    "--vqgan.channels", "4", "--vqgan.multipliers", "1", "2", "--vqgan.batch-size", "8",
    "--vqgan.discriminator-start", "1", "--vqgan.adaptive-weight", "--vqgan.steps",
]  # fmt: skip


def make_once(tmp_path_factory, name, make):
    """Returns a folder that all test processes share. The first process that needs it makes it."""
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
def vqgan_workdir(tmp_path_factory):
    """The folder of a small run with stage 1 only. Copy it before you write to it."""

    def make(workdir):
        command = ("train_vqgan.py", *TINY, 3, "--workdir", workdir, "--devices", 1)
        status, _, err = commands.run_here(*command, draw=False)
        assert status == 0, err

    return make_once(tmp_path_factory, "vqgan", make)


@pytest.fixture(scope="session")
def prior_workdir(vqgan_workdir, tmp_path_factory):
    """The folder of a small run with both stages. Copy it before you write to it."""

    def make(workdir):
        shutil.copytree(vqgan_workdir, workdir, dirs_exist_ok=True)
        status, _, err = commands.run_here(
            "train_prior.py", "--config", "mnist_tiny", "--workdir", workdir, "--devices", 1,
            "--prior.batch-size", 8, "--prior.steps", 2, "--prior.layers", 1,
        )  # fmt: skip
        assert status == 0, err

    return make_once(tmp_path_factory, "prior", make)
