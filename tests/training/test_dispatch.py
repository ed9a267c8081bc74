"""Tests of several steps per dispatch, which must be the same steps, bit for bit."""

import shutil

import jax
import numpy as np
import pytest

from taming_jax.errors import UserError
from taming_jax.parallel.devices import Devices
from taming_jax.training.cadences import Cadences
from taming_jax.training.dispatch import count_steps
from taming_jax.training.prior import PriorStage
from tests import small_runs

CADENCES = Cadences(validate=30, distance=None, save=100, log=20, draw=50)
EVERY_DROPOUT = {
    "prior__dropout": 0.2, "prior__attention_dropout": 0.2, "prior__label_dropout": 0.5,
    "prior__token_keep_prob": 0.8, "data__mirror": True, "prior__augmented_versions": 2,
}  # fmt: skip


def list_dispatches(size, stops, start):
    """Returns the numbers of steps per call from a step to the last of the `stops`."""
    counts, done = [], start
    while done < stops[-1]:
        counts.append(count_steps(done, size, CADENCES.periods, stops))
        done += counts[-1]
    return counts


def test_no_dispatch_crosses_a_cadence_or_the_end():
    # Single steps up to 20 (the log), 30 (a validation), 40, and 44 (the end).
    counts = list_dispatches(8, (44,), 10)
    assert counts == [8, 1, 1, 8, 1, 1, 8, 1, 1, 1, 1, 1, 1]
    # A profile starts after step 23 and ends with step 31.
    counts = list_dispatches(4, (23, 31, 40), 20)
    assert counts == [1, 1, 1, 4, 1, 1, 1, 1, 4, 4, 1]
    assert list_dispatches(1, (44,), 0) == [1] * 44


def test_a_number_that_no_dispatch_can_reach_is_refused_before_anything_changes(workdir):
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    settings = {"prior__steps": 40, "prior__steps_per_dispatch": 8, "data__mirror": True}
    settings["prior__log_every"] = 5
    message = "steps-per-dispatch is 8, but a line of the log is due every 5 steps; set --prior.log"
    with pytest.raises(UserError, match=message):
        small_runs.train(workdir, "prior", **settings)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose stage 1 has taken a step."""
    folder = tmp_path_factory.mktemp("dispatch")
    small_runs.train(folder, vqgan__steps=1, data__mirror=True)
    return folder


BFLOAT16 = {"dtype": "bfloat16", "prior__micro_batches": 2}


@pytest.mark.parametrize(
    "settings, count",
    [
        (EVERY_DROPOUT, 1),
        *[
            pytest.param(settings, count, marks=pytest.mark.slow)
            for settings in (EVERY_DROPOUT, BFLOAT16) for count in (1, 2, 4)
            if (settings, count) not in ((EVERY_DROPOUT, 1), (BFLOAT16, 4))
        ],
    ],
    ids=lambda x: x if isinstance(x, int) else x.get("dtype", "dropout"),
)  # fmt: skip
def test_steps_of_one_dispatch_equal_single_steps(workdir, count, settings):
    settings = {"data__mirror": True, "devices": count} | settings
    stage = PriorStage(small_runs.make_config(workdir, **settings), Devices(count))
    feed, _ = stage.build_feeds()
    start = feed.size // 8 - 4  # the second dispatch begins another epoch
    states, rows = {}, {}
    for size in (1, 4):
        state = stage.devices.replicate(stage.init(jax.random.key(0)))
        rows[size] = []
        for step in range(start, start + 8, size):
            state, metrics = stage.train_step(state, feed.batch(step, size))
            rows[size] += stage.devices.fetch(metrics).unpack()
        states[size] = stage.devices.fetch(state)
    assert rows[4] == rows[1] and len(rows[1]) == 8
    jax.tree.map(np.testing.assert_array_equal, states[4], states[1])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_killed_run_resumes_bit_for_bit_with_another_number(workdir, tmp_path, count):
    settings = EVERY_DROPOUT | {
        "devices": count,
        "prior__steps": 40, "prior__log_every": 10, "prior__eval_every": 20,
        "prior__checkpoint_every": 15,
    }  # fmt: skip
    dispatched = []
    for name in ("single", "several"):
        shutil.copytree(workdir, tmp_path / name)
    small_runs.train(tmp_path / "single", "prior", dispatched.append, **settings)
    assert dispatched == list(range(40))
    several, dispatched = tmp_path / "several", []

    def on_step(done):
        dispatched.append(done)
        small_runs.kill_at(34)(done)

    with pytest.raises(small_runs.Killed):
        small_runs.train(several, "prior", on_step, prior__steps_per_dispatch=4, **settings)
    assert dispatched == [0, 4, 8, 9, 10, 14, 15, 19, 20, 24, 28, 29, 30, 34]
    dispatched = []
    small_runs.train(several, "prior", dispatched.append, prior__steps_per_dispatch=3, **settings)
    assert dispatched == [30, 33, 36, 39]
    small_runs.assert_same_run(several, tmp_path / "single", 40, "prior")
