"""Runs of several processes on this machine, against runs of one."""

import json
import os
import pickle
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from taming_jax.train import hosts
from taming_jax.train.store import Store
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


def start_two(*arguments, devices=2):
    """A command in two processes of so many devices each, begun."""
    address = f"127.0.0.1:{commands.free_port()}"
    told = ("--distributed", "--coordinator-address", address, "--num-processes", 2)
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


def until(checkpoint, started):
    """Waits for a checkpoint of processes that train."""
    while not checkpoint.exists():
        for process in started:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


LONG = [
    "train_vqgan.py", *TINY, 2000, "--vqgan.checkpoint-every", 50, "--vqgan.log-every", 1,
    "--vqgan.eval-every", 2000, "--workdir",
]  # fmt: skip


def test_a_closed_connection_is_told_from_a_mistake():
    assert hosts.torn(ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"))
    assert hosts.torn(jax.errors.JaxRuntimeError("INTERNAL: connection reset"))
    assert not hosts.torn(ValueError("operands could not be broadcast together"))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_with_a_sentence_and_both_resume(tmp_path, lost):
    started = start_two(*LONG, tmp_path, devices=1)
    until(tmp_path / "checkpoints" / "vqgan" / "50", started)
    began = time.monotonic()
    started[lost].kill()
    _, err = started[1 - lost].communicate(timeout=120)
    assert time.monotonic() - began < 120
    assert started[1 - lost].returncode == 1
    assert err.count("\n") == 1 and err.startswith("failed: another process of this run"), err
    started[lost].communicate(timeout=60)
    saved = Store(tmp_path, "vqgan", "nll", read_only=True).steps()[-1]
    assert saved < 2000
    for status, _, err in run_two(*LONG, tmp_path, "--vqgan.steps", saved + 3, devices=1):
        assert status == 0, err
    rows = (tmp_path / "metrics" / "vqgan.jsonl").read_text().splitlines()
    trained = [row["step"] for row in map(json.loads, rows) if row["split"] == "train"]
    assert trained == list(range(1, saved + 4))


def test_a_signal_to_one_process_stops_and_saves_all_at_one_step(tmp_path):
    started = start_two(*LONG, tmp_path, devices=1)
    until(tmp_path / "checkpoints" / "vqgan" / "50", started)
    started[1].send_signal(signal.SIGTERM)
    ended = [process.communicate(timeout=60) for process in started]
    saved = Store(tmp_path, "vqgan", "nll", read_only=True).steps()[-1]
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 143, err
        assert f"Stopped by SIGTERM after step {saved}, which is saved" in err


def test_processes_with_other_settings_are_refused(tmp_path):
    told = (
        "train_vqgan.py", *TINY, 3, "--workdir", tmp_path / "run", "--distributed",
        "--coordinator-address", f"127.0.0.1:{commands.free_port()}", "--num-processes", 2,
    )  # fmt: skip
    started = [
        commands.start(*told, "--process-id", process, "--seed", 7 + process)
        for process in range(2)
    ]
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.count("\n") == 1, err
        assert "process 1 differs from process 0: --seed is 8, not 7" in err
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_does_not_answer_is_named(tmp_path):
    address = f"127.0.0.1:{commands.free_port()}"
    status, _, err = commands.run(
        "train_vqgan.py", *TINY, 3, "--workdir", tmp_path / "run", "--distributed",
        "--coordinator-address", address, "--num-processes", 2, "--process-id", 1,
        "--initialization-timeout", 2,
    )  # fmt: skip
    assert status == 2 and err.count("\n") == 1, err
    assert "within 2 seconds" in err and address in err


def alone(tmp_path, port, **more):
    """Process 0 of two, the other of which does not come."""
    return commands.start(
        "train_vqgan.py", *TINY, 3, "--workdir", tmp_path / "run", "--distributed",
        "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", 0,
        **more,
    )  # fmt: skip


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("joining", [False, True])
def test_ctrl_c_while_others_are_waited_for_is_one_sentence(tmp_path, joining):
    port = commands.free_port()
    process = alone(tmp_path, port, own_group=True)
    if joining:
        with socket.socket() as listens:
            while listens.connect_ex(("127.0.0.1", port)):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.05)
    else:  # as soon as there is a child
        while not children(process.pid):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 20
    assert err.strip() == "Stopped before anything was begun."


def test_a_port_in_use_is_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _, port = taken.getsockname()
        process = alone(tmp_path, port)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1, err
    # One version of JAX does either: it raises, or its process dies of it.
    assert "its port in use" in err or "a port of it that is free" in err, err
    assert f"127.0.0.1:{port}" in err


def test_two_processes_draw_what_one_would(both, tmp_path):
    told = ("scripts/sample.py", "--workdir", both, "--per-class", 20, "--out")
    status, _, err = commands.run(*told, tmp_path / "one.npz")
    assert status == 0, err
    for status, _, err in run_two(*told, tmp_path / "two.npz", devices=1):
        assert status == 0, err
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    np.testing.assert_array_equal(two["images"], one["images"])
    assert len(one["images"]) == 80
