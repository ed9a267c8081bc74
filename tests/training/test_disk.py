"""Disks that are full, or read-only, for a while or to the end."""

import contextlib
import json
import os
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.errors import RunFailed
from taming_jax.training.checkpoints import Store
from taming_jax.training.writers import read_rows
from tests import disks
from tests.training.test_loop import Parabola, train

CONFIG = load_config("mnist_tiny")
MANY = {"steps": 120, "log_every": 1, "checkpoint_every": 20, "eval_every": 30}
MANY |= {"draw_every": 20}


@pytest.fixture
def disk(tmp_path):
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(disks.mounted(tmp_path / "disk"))
        except disks.NoDisk as error:
            pytest.skip(str(error))
        yield disk


def tree(step):
    """A state that cannot be compressed, of 1 MB."""
    rng = np.random.default_rng(step)
    return {"step": np.int32(step), "kernel": rng.standard_normal(250_000).astype(np.float32)}


def test_what_the_disk_does_not_take_leaves_the_older_checkpoints(disk):
    store = Store(disk.folder, "vqgan")
    said = []
    store.say = said.append
    store.save(1, tree(1), CONFIG, {"nll": 0.5})
    store.save(2, tree(2), CONFIG, {"nll": 0.6})
    store.wait()
    # From no room at all, over some for its first files, to all but the end of its arrays.
    for room in (0, 20_000, 300_000, 900_000):
        time.sleep(0.2)  # a thread may still write what is left of the one before
        store._remove_partial()
        disk.fill(leave=room)
        store.save(3, tree(3), CONFIG, {"nll": 0.1})
        with pytest.raises(RunFailed, match=r"step 3 could not .*the last one is from step 2"):
            store.require(3)
        assert store.steps() == [1, 2] and store.best()[1] == 0.5
        disk.free()
    assert len(said) == 4 and all("The checkpoint of step 3 could not" in s for s in said)
    for step in (4, 5):
        store.save(step, tree(step), CONFIG, {"nll": 0.7})
        store.require(step)
    assert store.steps() == [1, 4, 5], "the best and the last two"
    assert len(said) == 4
    assert not list(store.path.glob("*tmp*")), "what there was of it was removed"
    for step in (1, 4, 5):
        arrays = Store(disk.folder, "vqgan").read(step).arrays
        np.testing.assert_array_equal(arrays["kernel",], tree(step)["kernel"])


def test_a_read_only_disk_likewise(disk):
    store = Store(disk.folder, "vqgan")
    said = []
    store.say = said.append
    store.save(1, tree(1), CONFIG, None)
    store.require(1)
    disk.read_only(True)
    store.save(2, tree(2), CONFIG, None)
    store.save(3, tree(3), CONFIG, None)
    store.wait()
    disk.read_only(False)
    assert len(said) == 2 and "Read-only" in said[0]
    store.save(4, tree(4), CONFIG, None)
    store.require(4)
    assert store.steps() == [1, 4]


def left(folder):
    """All that a run leaves but its speed and what TensorBoard reads: rows, arrays."""
    store = Store(folder, "vqgan")
    rows = read_rows(folder / "metrics" / "vqgan.jsonl")
    speed = [row["step"] for row in read_rows(folder / "metrics" / "vqgan_speed.jsonl")]
    config = json.loads((folder / "config.json").read_text())
    arrays = {path: x.tolist() for path, x in store.read(120).arrays.items()}
    return {"rows": rows, "speed": speed, "arrays": arrays} | {
        key: config[key] for key in ("vqgan", "data", "seed")
    }


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_run_outlives_a_disk_in_trouble(disk, tmp_path, capsys, monkeypatch, trouble):
    begin, end = {
        "full": (disk.fill, disk.free),
        "read-only": (lambda: disk.read_only(True), lambda: disk.read_only(False)),
    }[trouble]

    def on_step(step):
        if step == 5:
            begin()
        if step == 95:
            end()

    def draw(stage, state, folder, sums, rows):
        (folder / "big.png").write_bytes(bytes(5000))

    monkeypatch.setattr(Parabola, "draw_figures", draw)
    logs = ["JsonLines", "TensorBoard"]
    # Their open files would keep the disk from being made read-only.
    monkeypatch.setattr("taming_jax.training.loop.run_lock", lambda *_: contextlib.nullcontext())
    if trouble == "read-only":
        monkeypatch.setattr("taming_jax.training.writers.TensorBoard", lambda folder: mock.Mock())
        logs.remove("TensorBoard")
    train(tmp_path / "whole", **MANY)
    assert "cannot be written" not in capsys.readouterr().out
    train(disk.folder / "run", stage={"on_step": on_step}, **MANY)
    out = capsys.readouterr().out
    for log in logs:
        assert out.count(f"{log} cannot be written") == 1, out
        assert out.count(f"{log} can be written again") == 1, out
    assert out.count("The figures in ") == 2
    for step in (20, 40, 60, 80):
        assert out.count(f"The checkpoint of step {step} could not be written") == 1
    assert "Done: 120 steps" in out
    assert left(disk.folder / "run") == left(tmp_path / "whole")
    assert Store(disk.folder / "run", "vqgan").steps() == [100, 120]


def filling(disk, run):
    """Fills the disk at step 50, once what is saved before is on it."""
    store = Store(run, "vqgan")

    def on_step(step):
        if step == 50:
            while 40 not in store.steps():
                time.sleep(0.005)
            # As the next save does, which would make room.
            shutil.rmtree(store.path / "20", ignore_errors=True)
            disk.fill()

    return on_step


def test_a_disk_that_stays_full_is_the_status_and_the_run_can_go_on(disk, tmp_path):
    run = disk.folder / "run"
    with pytest.raises(RunFailed, match=r"step 120 could not .*the last one is from step 40"):
        train(run, stage={"on_step": filling(disk, run)}, **MANY)
    disk.free()
    train(run, **MANY)
    train(tmp_path / "whole", **MANY)
    assert left(run) == left(tmp_path / "whole")


def test_a_signal_whose_checkpoint_cannot_be_written_is_a_failure(disk):
    run = disk.folder / "run"
    fill = filling(disk, run)

    def on_step(step):
        fill(step)
        if step == 50:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunFailed, match=r"step 51 could not .*the last one is from step 40"):
        train(run, stage={"on_step": on_step}, **MANY)
