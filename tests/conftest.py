"""Four devices on any machine, set before JAX starts; tests that want one say so. And programs
compiled quickly, and kept in one place: most of a small run's time is compilation, and many are
compiled again. `XLA_FLAGS=--xla_backend_optimization_level=3` has them compiled as users have them.
"""

import os
import shutil
import tempfile

import pytest

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

LONGEST = ("test_torture", "test_devices", "test_resume", "test_hosts", "test_pictures")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no core is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


TINY = [
    "--config", "mnist_tiny", "--data.name", "synthetic", "--data.image-size", "16",
    "--vqgan.channels", "4", "--vqgan.multipliers", "1", "2", "--vqgan.batch-size", "8",
    "--vqgan.discriminator-start", "1", "--vqgan.adaptive-weight", "--vqgan.steps",
]  # fmt: skip


# A few hundred parameters, for tests of what happens around a step: compiled in a second or two.
TINIEST = {
    "data.name": "synthetic", "data.image_size": 8, "vqgan.channels": 4, "vqgan.multipliers": (1,),
    "vqgan.latent_channels": 4, "vqgan.codebook_size": 16, "vqgan.discriminator_layers": 1,
    "vqgan.discriminator_filters": 4, "vqgan.discriminator_start": 0.0, "vqgan.batch_size": 8,
    "prior.layers": 1, "prior.heads": 2, "prior.width": 16, "prior.batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """The folder of a small run that has stage 1 only. Copy it to write in it."""
    workdir = tmp_path_factory.mktemp("stage1")
    line = ("train_vqgan.py", *TINY, 3, "--workdir", workdir, "--devices", 1)
    status, _, err = commands.run_here(*line)
    assert status == 0, err
    return workdir


@pytest.fixture(scope="session")
def both(stage1, tmp_path_factory):
    """The folder of a small run of both stages. Copy it to write in it."""
    workdir = tmp_path_factory.mktemp("both") / "run"
    shutil.copytree(stage1, workdir)
    status, _, err = commands.run_here(
        "train_prior.py", "--config", "mnist_tiny", "--workdir", workdir, "--devices", 1,
        "--prior.batch-size", 8, "--prior.steps", 2, "--prior.layers", 1,
    )  # fmt: skip
    assert status == 0, err
    return workdir
