"""Four devices on any machine, set before JAX starts; tests that want one say so."""

import os

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)


TINY = [
    "--config", "mnist_tiny", "--data.name", "synthetic", "--data.image-size", "16",
    "--vqgan.channels", "4", "--vqgan.multipliers", "1", "2", "--vqgan.batch-size", "8",
    "--vqgan.discriminator-start", "1", "--vqgan.steps",
]  # fmt: skip


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """The folder of a small run that has stage 1 only. Copy it to write in it."""
    from tests import commands

    workdir = tmp_path_factory.mktemp("stage1")
    status, _, err = commands.run("train_vqgan.py", *TINY, 3, "--workdir", workdir)
    assert status == 0, err
    return workdir
