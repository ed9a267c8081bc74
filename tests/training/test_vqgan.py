"""Tests of stage 1 as the loop uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config, read_config
from taming_jax.errors import RunFailed, UserError
from taming_jax.parallel.devices import Devices
from taming_jax.training import loop
from taming_jax.training.checkpoints import Store
from taming_jax.training.vqgan import VQGANStage, resolve_discriminator_start
from taming_jax.training.vqgan_step import VQGANObjective
from taming_jax.training.writers import read_rows
from tests import small_runs

SMALL = {
    "data.name": "synthetic", "data.image_size": 12, "vqgan.channels": 4,
    "vqgan.multipliers": (1,), "vqgan.batch_size": 8, "vqgan.discriminator_start": 0.0,
    "vqgan.adaptive_weight": True,
}  # fmt: skip


def make_steps_infinite(monkeypatch, steps):
    """Makes the images of these steps infinite. The steps are counted from 1."""
    compute_gradients = VQGANObjective.compute_gradients

    def compute_with_infinite_images(
        self, generator, discriminator, images, lpips, adversarial, step, *rest
    ):
        images += jnp.where(jnp.isin(step + 1, jnp.array(steps)), jnp.inf, 0)
        return compute_gradients(
            self, generator, discriminator, images, lpips, adversarial, step, *rest
        )

    monkeypatch.setattr(VQGANObjective, "compute_gradients", compute_with_infinite_images)


class RecordingStage(VQGANStage):
    """Stage 1 that keeps the state before and after step 50."""

    def train_step(self, state, batch):
        if batch.step == 49:
            self.before = jax.tree.map(np.array, state)
        state, metrics = super().train_step(state, batch)
        if batch.step == 49:
            self.after = jax.tree.map(np.array, state)
        return state, metrics


@pytest.mark.slow
def test_non_finite_steps_are_skipped_until_there_are_too_many_in_a_row(
    tmp_path, monkeypatch, capsys
):
    make_steps_infinite(monkeypatch, [50, 53, 54, 55])
    settings = {
        "vqgan.lecam_weight": 0.1, "vqgan.steps": 60, "vqgan.log_every": 1,
        "vqgan.skipped_in_a_row": 2, "devices": 1, "workdir": str(tmp_path),
    }  # fmt: skip
    built = []

    def build(config, devices, restart=False):
        built.append(RecordingStage(config, devices))
        return built[0]

    with pytest.raises(
        RunFailed, match="non-finite values at step 55, after 2 skipped steps .*: .*l1"
    ):
        loop.train(build, load_config("mnist_tiny", SMALL | settings))
    before, after = built[0].before, built[0].after
    assert (int(before.step), int(before.skipped)) == (49, 0)
    assert (int(after.step), int(after.skipped)) == (50, 1)
    jax.tree.map(np.testing.assert_array_equal, after.nets, before.nets)
    assert "Step 50 was skipped: non-finite values in " in capsys.readouterr().out
    rows = read_rows(tmp_path / "metrics" / "vqgan.jsonl")
    assert [row["skipped"] for row in rows] == 49 * [0] + [1, 1, 1, 2, 3]
    assert all(np.isfinite(value) for r in rows for key, value in r.items() if key != "split")
    assert rows[49].keys() < rows[50].keys(), "the skipped step has no losses"


def read_adversarial_steps(workdir):
    """Returns the steps at which the discriminator was trained according to the log."""
    rows = read_rows(workdir / "metrics" / "vqgan.jsonl")
    return [r["step"] for r in rows if r["split"] == "train" and "discriminator" in r]


@pytest.fixture
def make_config(tmp_path):
    """Returns a function that makes the config of a run with a number of steps. The discriminator
    takes part in the second half of them."""

    def config(steps, **overrides):
        settings = {"vqgan.discriminator_start": 0.5, "vqgan.steps": steps, "vqgan.log_every": 1}
        settings |= {"devices": 1, "workdir": str(tmp_path)}
        return load_config("mnist_tiny", SMALL | settings | overrides)

    return config


def check_longer_runs(make_config, capsys):
    """Checks that the discriminator of a longer run starts after step 2, as in the run of 4 steps,
    and that another start is refused."""
    longer = VQGANStage(make_config(10), Devices(1))
    assert (longer.start, longer.config.vqgan.discriminator_start_step) == (2, 2)
    assert "The discriminator starts after step 2, as computed" in capsys.readouterr().out
    assert VQGANStage(make_config(10), Devices(1), restart=True).start == 5
    with pytest.raises(UserError, match="start-step is 7, but the run in .* was created with 2"):
        VQGANStage(make_config(12, **{"vqgan.discriminator_start_step": 7}), Devices(1))


def test_a_resumed_stage_takes_the_discriminator_start_from_its_checkpoints(
    make_config, tmp_path, capsys
):
    """The checkpoints of older versions have only the fraction of the steps."""
    store = Store(tmp_path, "vqgan")
    store.save(4, {"step": np.int32(4)}, make_config(4), None)
    store.require(4)
    check_longer_runs(make_config, capsys)


@pytest.mark.slow
def test_a_longer_run_keeps_the_discriminator_start(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VQGANStage, "draw_figures", lambda *_: None)
    loop.train(VQGANStage, make_config(4))
    assert read_adversarial_steps(tmp_path) == [3, 4]
    assert read_config(tmp_path / "config.json").vqgan.discriminator_start_step == 2
    check_longer_runs(make_config, capsys)


NEVER, QUARTER = {"discriminator_start": 1.0}, {"discriminator_start": 0.25}


@pytest.mark.parametrize(
    ("old_settings", "new_settings", "start"),
    [
        (None, QUARTER, 25),
        (None, NEVER, None),
        (None, NEVER | {"discriminator_start_step": 3}, 3),
        ({"steps": 20, "discriminator_start_step": 8}, {}, 8),
        ({"steps": 20} | QUARTER, QUARTER, 5),
        ({"epochs": 4, "steps": None} | QUARTER, QUARTER, 2),
        ({"steps": 20} | NEVER, NEVER, None),
    ],
)
def test_the_discriminator_start_is_fixed_when_a_run_is_created(old_settings, new_settings, start):
    """The configs of older versions have only the fraction of the steps. If the discriminator never
    started, it does not start later."""

    def config(settings):
        settings = {"batch_size": 10, "steps": 100} | settings
        return load_config("mnist_tiny", {f"vqgan.{key}": x for key, x in settings.items()})

    before = None if old_settings is None else config(old_settings)
    fixed_config = resolve_discriminator_start(config(new_settings), 20, before)
    assert fixed_config.vqgan.discriminator_start_step == start


@pytest.mark.slow
def test_with_discriminator_every_2_the_discriminator_learns_in_every_second_step():
    settings = {
        "data__mirror": True, "vqgan__steps": 4, "vqgan__discriminator_every": 2,
        "vqgan__adaptive_weight": True, "vqgan__diff_augment": ("color", "translation", "cutout"),
    }  # fmt: skip
    stage = VQGANStage(small_runs.make_config(None, **settings), Devices(1))
    training, _ = stage.build_feeds()
    states = [stage.devices.replicate(stage.init(jax.random.key(0)))]
    for step in range(4):
        before = jax.tree.map(np.array, states[-1])
        state, metrics = stage.train_step(states[-1], training.batch(step))
        states[-1] = before
        states.append(state)
        assert np.isfinite(metrics.values).all()

    def has_changed(before, after, part):
        pairs = zip(*(jax.tree.leaves(getattr(s, part)) for s in (before, after)), strict=True)
        return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)

    for step, learns in enumerate((True, False, True, False)):
        before, after = (s.nets["discriminator"] for s in states[step : step + 2])
        assert has_changed(before, after, "params") == learns
        assert has_changed(before, after, "opt_state") == learns
        assert has_changed(before, after, "extra"), "the statistics include every batch"
        assert has_changed(*(s.nets["generator"] for s in states[step : step + 2]), "params")
