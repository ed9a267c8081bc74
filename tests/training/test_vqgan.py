"""Stage 1 as the loop sees it."""

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


def planted(monkeypatch, steps):
    """Makes the images of these steps (counted from 1) infinite."""
    gradients = VQGANObjective.compute_gradients

    def broken(self, generator, discriminator, images, lpips, adversarial, step, *rest):
        images += jnp.where(jnp.isin(step + 1, jnp.array(steps)), jnp.inf, 0)
        return gradients(self, generator, discriminator, images, lpips, adversarial, step, *rest)

    monkeypatch.setattr(VQGANObjective, "compute_gradients", broken)


class Watched(VQGANStage):
    """Keeps the state before and after step 50."""

    def train_step(self, state, batch):
        if batch.step == 49:
            self.before = jax.tree.map(np.array, state)
        state, metrics = super().train_step(state, batch)
        if batch.step == 49:
            self.after = jax.tree.map(np.array, state)
        return state, metrics


@pytest.mark.slow
def test_an_infinity_is_skipped_counted_and_survived_and_too_many_in_a_row_are_not(
    tmp_path, monkeypatch, capsys
):
    planted(monkeypatch, [50, 53, 54, 55])
    settings = {
        "vqgan.lecam_weight": 0.1, "vqgan.steps": 60, "vqgan.log_every": 1,
        "vqgan.skipped_in_a_row": 2, "devices": 1, "workdir": str(tmp_path),
    }  # fmt: skip
    built = []

    def build(config, devices, restart=False):
        built.append(Watched(config, devices))
        return built[0]

    with pytest.raises(
        RunFailed, match="non-finite values at step 55, after 2 steps skipped .*: .*l1"
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


def adversarial_steps(workdir):
    """The steps at which a discriminator was trained, by the log."""
    rows = read_rows(workdir / "metrics" / "vqgan.jsonl")
    return [r["step"] for r in rows if r["split"] == "train" and "discriminator" in r]


@pytest.fixture
def config_of(tmp_path):
    """Settings of a run of so many steps, of which the discriminator takes part in half."""

    def config(steps, **overrides):
        settings = {"vqgan.discriminator_start": 0.5, "vqgan.steps": steps, "vqgan.log_every": 1}
        settings |= {"devices": 1, "workdir": str(tmp_path)}
        return load_config("mnist_tiny", SMALL | settings | overrides)

    return config


def check_longer_runs(config_of, capsys):
    """After step 2 of 4 steps, though half of 10 are 5; another step is refused."""
    longer = VQGANStage(config_of(10), Devices(1))
    assert (longer.start, longer.config.vqgan.discriminator_start_step) == (2, 2)
    assert "The discriminator starts after step 2, as computed" in capsys.readouterr().out
    assert VQGANStage(config_of(10), Devices(1), restart=True).start == 5
    with pytest.raises(UserError, match="start-step is 7, but the run in .* was created with 2"):
        VQGANStage(config_of(12, **{"vqgan.discriminator_start_step": 7}), Devices(1))


def test_a_resumed_stage_takes_the_discriminators_start_from_its_checkpoints(
    config_of, tmp_path, capsys
):
    """Also from those of older versions, which have the share only."""
    store = Store(tmp_path, "vqgan")
    store.save(4, {"step": np.int32(4)}, config_of(4), None)
    store.require(4)
    check_longer_runs(config_of, capsys)


@pytest.mark.slow
def test_a_longer_run_keeps_the_discriminators_start(config_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VQGANStage, "draw_figures", lambda *_: None)
    loop.train(VQGANStage, config_of(4))
    assert adversarial_steps(tmp_path) == [3, 4]
    assert read_config(tmp_path / "config.json").vqgan.discriminator_start_step == 2
    check_longer_runs(config_of, capsys)


NEVER, QUARTER = {"discriminator_start": 1.0}, {"discriminator_start": 0.25}


@pytest.mark.parametrize(
    ("created", "given", "start"),
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
def test_the_discriminators_start_is_decided_once(created, given, start):
    """Also for runs of older versions, whose config has the share only; "never" stays never."""

    def config(settings):
        settings = {"batch_size": 10, "steps": 100} | settings
        return load_config("mnist_tiny", {f"vqgan.{key}": x for key, x in settings.items()})

    before = None if created is None else config(created)
    found = resolve_discriminator_start(config(given), 20, before)
    assert found.vqgan.discriminator_start_step == start


def test_a_discriminator_that_is_held_back_learns_in_every_second_step_only():
    settings = {
        "data__mirror": True, "vqgan__steps": 4, "vqgan__discriminator_every": 2,
        "vqgan__adaptive_weight": True, "vqgan__diff_augment": ("color", "translation", "cutout"),
    }  # fmt: skip
    stage = VQGANStage(small_runs.small_config(None, **settings), Devices(1))
    training, _ = stage.build_feeds()
    states = [stage.devices.replicate(stage.init(jax.random.key(0)))]
    for step in range(4):
        before = jax.tree.map(np.array, states[-1])
        state, metrics = stage.train_step(states[-1], training.batch(step))
        states[-1] = before
        states.append(state)
        assert all(np.isfinite(value) for value in metrics.values())

    def changed(before, after, part):
        pairs = zip(*(jax.tree.leaves(getattr(s, part)) for s in (before, after)), strict=True)
        return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)

    for step, learns in enumerate((True, False, True, False)):
        before, after = (s.nets["discriminator"] for s in states[step : step + 2])
        assert changed(before, after, "params") == learns
        assert changed(before, after, "opt_state") == learns
        assert changed(before, after, "extra"), "it sees every batch"
        assert changed(*(s.nets["generator"] for s in states[step : step + 2]), "params")
