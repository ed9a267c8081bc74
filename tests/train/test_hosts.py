"""Runs of several processes on this machine, against runs of one."""

import pickle
import socket

import numpy as np
import pytest

from tests import commands, golden
from tests.conftest import TINY

# With everything on that a step can have, so that every kind of state is compared.
STAGE1 = [
    "train_vqgan.py", *TINY, 20, "--vqgan.discriminator-start", 0, "--vqgan.lecam-weight", 0.1,
    "--vqgan.diff-augment", "color", "translation", "--data.mirror",
]  # fmt: skip
STAGE2 = [
    "train_prior.py", "--config", "mnist_tiny", "--prior.batch-size", 8, "--prior.layers", 1,
    "--prior.width", 32, "--prior.dropout", 0.3, "--prior.label-dropout", 0.5,
    "--prior.keep-codes", 0.8, "--prior.augmented-versions", 2, "--prior.steps",
]  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_two(*arguments, devices=2):
    """A command in two processes of so many devices each, begun."""
    told = (
        "--distributed", "--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", 2
    )  # fmt: skip
    return [
        commands.start(*arguments, *told, "--process-id", process, devices=devices)
        for process in range(2)
    ]


def run_two(*arguments, devices=2):
    """A command in two processes run to its end: each one's status, stdout and stderr."""
    started = start_two(*arguments, devices=devices)
    ended = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]


def one_step(workdir, stage, out, count):
    """The next step on `count` devices, or of two processes with two devices each ("2x2")."""
    told = ("tests/one_step.py", workdir, stage, out)
    if count == "2x2":
        results = run_two(*told)
    else:
        results = [commands.run(*told, "--devices", count, devices=count)]
    for status, _, err in results:
        assert status == 0, err
    return pickle.loads(out.read_bytes())


def assert_same_step(found, expected, name):
    np.testing.assert_array_equal(found["seen"], expected["seen"], err_msg=name)
    for part in ("step", "metrics", "gradients", "extra"):
        golden.assert_trees_close(found[part], expected[part], f"{name} {part} ", 1e-5, 1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("hosts") / "run"
    for command in (STAGE1, [*STAGE2, 10]):
        status, _, err = commands.run(*command, "--workdir", workdir)
        assert status == 0, err
    return workdir


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_many_devices_and_processes_take_the_step_that_one_would(trained, tmp_path, stage):
    expected = one_step(trained, stage, tmp_path / "1", 1)
    assert expected["step"] == (20 if stage == "vqgan" else 10)
    if stage == "vqgan":
        assert expected["metrics"]["adaptive_weight"] > 0
    for count in (8, "2x2"):
        found = one_step(trained, stage, tmp_path / str(count), count)
        assert_same_step(found, expected, str(count))
