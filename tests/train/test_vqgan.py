"""Stage 1 as the loop sees it."""

import jax
import numpy as np

from taming_jax.config import load_config
from taming_jax.train.devices import Devices
from taming_jax.train.vqgan import VQGANStage


def test_a_discriminator_that_is_held_back_learns_in_every_second_step_only():
    config = load_config(
        "mnist_tiny",
        {
            "data.name": "synthetic", "data.image_size": 16, "data.mirror": True,
            "vqgan.channels": 4, "vqgan.multipliers": (1, 2), "vqgan.batch_size": 8,
            "vqgan.steps": 4, "vqgan.discriminator_start": 0.0, "vqgan.discriminator_every": 2,
            "vqgan.diff_augment": ("color", "translation", "cutout"),
        },
    )  # fmt: skip
    stage = VQGANStage(config, Devices(1))
    training, _ = stage.feeds()
    states = [stage.init(jax.random.key(0))]
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
