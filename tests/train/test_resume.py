"""Runs that are killed, damaged or stopped, against a run that was not."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from taming_jax.train.store import Store
from tests import commands
from tests.train.test_store import flip_byte, largest_file

COMMAND = [
    "train_vqgan.py", "--config", "mnist_tiny", "--seed", "3", "--vqgan.steps", "40",
    "--vqgan.batch-size", "16", "--vqgan.checkpoint-every", "10", "--workdir",
]  # fmt: skip


def last_arrays(workdir):
    return Store(workdir, "vqgan", "nll", read_only=True).read(40)[0]


def rows(workdir):
    lines = (workdir / "metrics" / "vqgan.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_arrays(workdir, unbroken):
    expected, arrays = last_arrays(unbroken), last_arrays(workdir)
    assert set(arrays) == set(expected) and len(arrays) > 100
    for path, array in expected.items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=".".join(path))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    status, out, err = commands.run(*COMMAND, workdir)
    assert status == 0, err
    assert f"The figures are in {workdir}/figures" in out
    assert len(list((workdir / "figures").glob("*.png"))) == 5
    return workdir


def stopped_after(command, checkpoint, signum):
    """A run that a signal ends once a checkpoint is whole."""
    process = commands.start(*command)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("killed")
    status, _ = stopped_after(
        [*COMMAND, workdir], workdir / "checkpoints" / "vqgan" / "20", signal.SIGKILL
    )
    steps = Store(workdir, "vqgan", "nll", read_only=True).steps()
    assert status == -signal.SIGKILL and 20 in steps and 40 not in steps
    return workdir


def test_a_killed_run_goes_on_bit_for_bit(killed, unbroken, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    status, _, err = commands.run(*COMMAND, workdir)
    assert status == 0, err
    assert_same_arrays(workdir, unbroken)
    assert rows(workdir) == rows(unbroken)
    status, out, err = commands.run(*COMMAND, workdir)
    assert status == 0 and "trained already" in out


def test_a_flipped_byte_is_named_and_the_checkpoint_before_it_used(killed, unbroken, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    steps = Store(workdir, "vqgan", "nll", read_only=True).steps()
    newest = workdir / "checkpoints" / "vqgan" / str(steps[-1])
    flip_byte(largest_file(newest))
    status, out, err = commands.run(*COMMAND, workdir)
    assert status == 0, err
    assert f"{newest} is damaged" in out and f"of step {steps[-2]}, is used" in out
    assert_same_arrays(workdir, unbroken)


def test_a_stopped_run_saves_and_goes_on_bit_for_bit(unbroken, tmp_path):
    returned, err = stopped_after(
        [*COMMAND, tmp_path], tmp_path / "checkpoints" / "vqgan" / "10", signal.SIGTERM
    )
    assert returned == 143, err
    assert "Stopped by SIGTERM after step" in err and "Traceback" not in err
    step = Store(tmp_path, "vqgan", "nll", read_only=True).steps()[-1]
    assert 10 < step < 40 and f"after step {step}," in err
    assert commands.run(*COMMAND, tmp_path)[0] == 0
    assert_same_arrays(tmp_path, unbroken)
