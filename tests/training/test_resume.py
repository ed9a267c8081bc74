"""Compares runs that are killed, damaged, or stopped with an uninterrupted run."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from taming_jax.errors import Interrupted
from taming_jax.training.checkpoints import Store
from tests import commands, small_runs
from tests.small_runs import Killed, assert_same_run, kill_at, list_saved_steps, stop_at
from tests.training.test_checkpoints import find_largest_file, flip_byte

COMMAND = [
    "train_vqgan.py", "--config", "mnist_tiny", "--data.name", "synthetic",
    "--data.image-size", "8", "--vqgan.channels", "4", "--vqgan.multipliers", "1",
    "--vqgan.latent-channels", "4", "--vqgan.codebook-size", "16",
    "--vqgan.discriminator-layers", "1", "--vqgan.discriminator-filters", "4",
    "--vqgan.discriminator-start", "0", "--vqgan.batch-size", "8", "--vqgan.steps", "40",
    "--vqgan.checkpoint-every", "10", "--devices", "1", "--workdir",
]  # fmt: skip
STEPS = 40
HOST_DEVICES = 4  # as in the process of the tests, because rounding in XLA depends on their number


def read_last_arrays(workdir):
    return Store(workdir, "vqgan").read(STEPS).arrays


def read_log(workdir):
    lines = (workdir / "metrics" / "vqgan.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_arrays(workdir, uninterrupted):
    expected, arrays = read_last_arrays(uninterrupted), read_last_arrays(workdir)
    assert set(arrays) == set(expected) and len(arrays) > 100
    for path, array in expected.items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=".".join(path))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    status, _, err = commands.run_here(*COMMAND, workdir, draw=False)
    assert status == 0, err
    return workdir


def stop_after(command, checkpoint, signum, devices=1):
    """Starts a run and sends it a signal when a checkpoint is complete. Returns the exit status and
    stderr."""
    process = commands.start(*command, devices=devices)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("killed")
    status, _ = stop_after(
        [*COMMAND, workdir], workdir / "checkpoints" / "vqgan" / "20", signal.SIGKILL, HOST_DEVICES
    )
    steps = Store(workdir, "vqgan").steps()
    assert status == -signal.SIGKILL and 20 in steps and STEPS not in steps
    return workdir


@pytest.mark.slow
def test_a_killed_command_resumes_bit_for_bit(killed, uninterrupted, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    status, out, err = commands.run(*COMMAND, workdir, devices=HOST_DEVICES)
    assert status == 0, err
    assert f"The figures are in {workdir}/figures" in out
    assert len(list((workdir / "figures").glob("*.png"))) == 5
    assert_same_arrays(workdir, uninterrupted)
    assert read_log(workdir) == read_log(uninterrupted)
    status, out, err = commands.run_here(*COMMAND, workdir)
    assert status == 0 and "already trained" in out, err


@pytest.mark.slow
def test_a_checkpoint_with_a_flipped_bit_is_reported_and_the_previous_one_is_used(
    killed, uninterrupted, tmp_path
):
    workdir = shutil.copytree(killed, tmp_path / "run")
    steps = Store(workdir, "vqgan").steps()
    newest = workdir / "checkpoints" / "vqgan" / str(steps[-1])
    flip_byte(find_largest_file(newest))
    status, out, err = commands.run(*COMMAND, workdir, devices=HOST_DEVICES)
    assert status == 0, err
    assert (
        f"{newest} is damaged" in out
        and f"Using the checkpoint of step {steps[-2]} instead." in out
    )
    assert_same_arrays(workdir, uninterrupted)


@pytest.mark.slow
def test_a_stopped_command_saves_and_resumes_bit_for_bit(uninterrupted, tmp_path):
    status, err = stop_after(
        [*COMMAND, tmp_path],
        tmp_path / "checkpoints" / "vqgan" / "10",
        signal.SIGTERM,
        HOST_DEVICES,
    )
    assert status == 143, err
    assert "Stopped by SIGTERM after step" in err and "Traceback" not in err
    step = Store(tmp_path, "vqgan").steps()[-1]
    assert 10 < step < STEPS and f"after step {step}," in err
    assert commands.run(*COMMAND, tmp_path, devices=HOST_DEVICES)[0] == 0
    assert_same_arrays(tmp_path, uninterrupted)


# The following tests do the same in this process.

SMALL = {"vqgan__steps": 12, "vqgan__checkpoint_every": 4, "vqgan__eval_every": 7}
SMALL |= {"vqgan__discriminator_start": 0.5, "vqgan__lecam_weight": 0.1, "data__mirror": True}


@pytest.fixture(scope="module")
def small_uninterrupted(tmp_path_factory):
    """The folder of a small uninterrupted run."""
    workdir = tmp_path_factory.mktemp("small-uninterrupted")
    small_runs.train(workdir, **SMALL)
    return workdir


@pytest.fixture(scope="module")
def small_killed(tmp_path_factory):
    """The folder of a small run that was killed before its eleventh step."""
    workdir = tmp_path_factory.mktemp("small-killed")
    with pytest.raises(Killed):
        small_runs.train(workdir, on_step=kill_at(10), **SMALL)
    assert list_saved_steps(workdir) == [7, 8], "step 7 is the only one that was validated"
    return workdir


def test_a_killed_run_resumes_bit_for_bit(small_killed, small_uninterrupted, tmp_path, capsys):
    workdir = shutil.copytree(small_killed, tmp_path / "run")
    small_runs.train(workdir, **SMALL)
    assert_same_run(workdir, small_uninterrupted, 12)
    small_runs.train(workdir, **SMALL)
    assert "already trained" in capsys.readouterr().out
    assert_same_run(workdir, small_uninterrupted, 12)


def test_a_killed_run_with_a_damaged_checkpoint_resumes_bit_for_bit(
    small_killed, small_uninterrupted, tmp_path, capsys
):
    workdir = shutil.copytree(small_killed, tmp_path / "run")
    newest = workdir / "checkpoints" / "vqgan" / "8"
    flip_byte(find_largest_file(newest))
    small_runs.train(workdir, **SMALL)
    out = capsys.readouterr().out
    assert f"{newest} is damaged" in out and "Using the checkpoint of step 7 instead." in out
    assert_same_run(workdir, small_uninterrupted, 12)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_resumes_bit_for_bit(small_uninterrupted, tmp_path, signum):
    name = signal.Signals(signum).name
    with pytest.raises(Interrupted, match=f"Stopped by {name} after step 7, ") as stop:
        small_runs.train(tmp_path, on_step=stop_at(6, signum), **SMALL)
    assert stop.value.signum == signum and list_saved_steps(tmp_path)[-1] == 7
    small_runs.train(tmp_path, **SMALL)
    assert_same_run(tmp_path, small_uninterrupted, 12)
