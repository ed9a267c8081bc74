"""Tests of runs on a disk that is full or read-only, temporarily or until the end."""

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
from taming_jax.training.writers import DESTINATIONS, read_rows
from tests import disks
from tests.training.test_loop import Parabola, train

CONFIG = load_config("mnist_tiny")
SETTINGS = {"steps": 120, "log_every": 1, "checkpoint_every": 20, "eval_every": 30}
SETTINGS |= {"draw_every": 20}


@pytest.fixture
def disk(tmp_path):
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(disks.mount(tmp_path / "disk"))
        except disks.NoDisk as error:
            pytest.skip(str(error))
        yield disk


def make_state(step):
    """Returns a state of 1 MB that cannot be compressed."""
    rng = np.random.default_rng(step)
    return {"step": np.int32(step), "kernel": rng.standard_normal(250_000).astype(np.float32)}


def test_a_save_that_fails_on_a_full_disk_keeps_the_older_checkpoints(disk):
    store = Store(disk.folder, "vqgan")
    messages = []
    store.say = messages.append
    store.save(1, make_state(1), CONFIG, {"nll": 0.5})
    store.save(2, make_state(2), CONFIG, {"nll": 0.6})
    store.wait()
    # The space ranges from none, over enough for the first files, to all but the last arrays.
    for free_bytes in (0, 20_000, 300_000, 900_000):
        time.sleep(0.2)  # a thread may still write the rest of the previous save
        store._remove_partial()
        disk.fill(leave=free_bytes)
        store.save(3, make_state(3), CONFIG, {"nll": 0.1})
        with pytest.raises(RunFailed, match=r"step 3 could not .*the last one is from step 2"):
            store.require(3)
        assert store.steps() == [1, 2] and store.best()[1] == 0.5
        disk.free()
    assert len(messages) == 4 and all(
        "The checkpoint of step 3 could not" in message for message in messages
    )
    for step in (4, 5):
        store.save(step, make_state(step), CONFIG, {"nll": 0.7})
        store.require(step)
    assert store.steps() == [1, 4, 5], "the best and the last two"
    assert len(messages) == 4
    assert not list(store.path.glob("*tmp*")), "the partial checkpoint was removed"
    for step in (1, 4, 5):
        arrays = Store(disk.folder, "vqgan").read(step).arrays
        np.testing.assert_array_equal(arrays["kernel",], make_state(step)["kernel"])


def test_a_save_that_fails_on_a_read_only_disk_keeps_the_older_checkpoints(disk):
    store = Store(disk.folder, "vqgan")
    messages = []
    store.say = messages.append
    store.save(1, make_state(1), CONFIG, None)
    store.require(1)
    disk.set_read_only(True)
    store.save(2, make_state(2), CONFIG, None)
    store.save(3, make_state(3), CONFIG, None)
    store.wait()
    disk.set_read_only(False)
    assert len(messages) == 2 and "Read-only" in messages[0]
    store.save(4, make_state(4), CONFIG, None)
    store.require(4)
    assert store.steps() == [1, 4]


def read_run(folder):
    """Returns what two equal runs have in common: rows, logged steps, arrays, and config."""
    store = Store(folder, "vqgan")
    rows = read_rows(folder / "metrics" / "vqgan.jsonl")
    speed = [row["step"] for row in read_rows(folder / "metrics" / "vqgan_speed.jsonl")]
    config = json.loads((folder / "config.json").read_text())
    arrays = {path: x.tolist() for path, x in store.read(120).arrays.items()}
    return {"rows": rows, "speed": speed, "arrays": arrays} | {
        key: config[key] for key in ("vqgan", "data", "seed")
    }


@pytest.mark.parametrize("failure", ["full", "read-only"])
def test_a_run_survives_a_disk_that_fails_temporarily(disk, tmp_path, capsys, monkeypatch, failure):
    start_failure, end_failure = {
        "full": (disk.fill, disk.free),
        "read-only": (lambda: disk.set_read_only(True), lambda: disk.set_read_only(False)),
    }[failure]

    def on_step(step):
        if step == 5:
            start_failure()
        if step == 95:
            end_failure()

    def draw(stage, state, folder, sums, rows):
        (folder / "big.png").write_bytes(bytes(5000))

    def save_and_wait(store, *args, **settings):
        save(store, *args, **settings)
        store.wait()  # otherwise, the disk may be writable again before the checkpoint is written

    save = Store.save
    monkeypatch.setattr(Store, "save", save_and_wait)
    monkeypatch.setattr(Parabola, "draw_figures", draw)
    logs = ["JsonLines", "TensorBoard"]
    # Open files would prevent the disk from becoming read-only.
    monkeypatch.setattr("taming_jax.training.loop.folder_lock", lambda *_: contextlib.nullcontext())
    if failure == "read-only":
        monkeypatch.setitem(DESTINATIONS, "tensorboard", lambda config, stage: mock.Mock())
        logs.remove("TensorBoard")
    train(tmp_path / "uninterrupted", **SETTINGS)
    assert "cannot be written" not in capsys.readouterr().out
    train(disk.folder / "run", stage={"on_step": on_step}, **SETTINGS)
    out = capsys.readouterr().out
    for log in logs:
        assert out.count(f"{log} cannot be written") == 1, out
        assert out.count(f"{log} can be written again") == 1, out
    assert out.count("The figures in ") == 2
    for step in (20, 40, 60, 80):
        assert out.count(f"The checkpoint of step {step} could not be written") == 1
    assert "Done: 120 steps" in out
    assert read_run(disk.folder / "run") == read_run(tmp_path / "uninterrupted")
    assert Store(disk.folder / "run", "vqgan").steps() == [100, 120]


def make_disk_filler(disk, run):
    """Returns an `on_step` that fills the disk at step 50, after the checkpoint of step 40 was
    saved."""
    store = Store(run, "vqgan")

    def on_step(step):
        if step == 50:
            while 40 not in store.steps():
                time.sleep(0.005)
            # The next save would also remove this checkpoint, which would free space.
            shutil.rmtree(store.path / "20", ignore_errors=True)
            disk.fill()

    return on_step


def test_a_disk_that_stays_full_fails_the_run_which_can_be_resumed_later(disk, tmp_path):
    run = disk.folder / "run"
    with pytest.raises(RunFailed, match=r"step 120 could not .*the last one is from step 40"):
        train(run, stage={"on_step": make_disk_filler(disk, run)}, **SETTINGS)
    disk.free()
    train(run, **SETTINGS)
    train(tmp_path / "uninterrupted", **SETTINGS)
    assert read_run(run) == read_run(tmp_path / "uninterrupted")


def test_a_stopped_run_whose_checkpoint_cannot_be_written_fails(disk):
    run = disk.folder / "run"
    fill = make_disk_filler(disk, run)

    def on_step(step):
        fill(step)
        if step == 50:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunFailed, match=r"step 51 could not .*the last one is from step 40"):
        train(run, stage={"on_step": on_step}, **SETTINGS)
