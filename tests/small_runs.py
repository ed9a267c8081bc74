"""Helpers that train models of a few hundred parameters in this process and read their files.

Compilation takes nearly all of the time. Therefore the compiled stage 1 is cached for runs that
differ only in their folder.
"""

import dataclasses
import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.training import loop
from taming_jax.training.checkpoints import Store
from taming_jax.training.prior import PriorStage
from taming_jax.training.vqgan import VQGANStage

SETTINGS = {
    "data.name": "synthetic", "data.image_size": 8, "devices": 1, "vqgan.channels": 4,
    "vqgan.multipliers": (1,), "vqgan.latent_channels": 4, "vqgan.codebook_size": 16,
    "vqgan.discriminator_layers": 1, "vqgan.discriminator_filters": 4,
    "vqgan.discriminator_start": 0.0, "vqgan.batch_size": 8, "prior.layers": 1, "prior.heads": 2,
    "prior.width": 16, "prior.batch_size": 8,
}  # fmt: skip


# All optional parts of a step, so that tests compare every kind of state.
EVERYTHING = {
    "vqgan__lecam_weight": 0.1, "vqgan__adaptive_weight": True,
    "vqgan__diff_augment": ("color", "translation"), "data__mirror": True,
}  # fmt: skip


class Killed(BaseException):
    """An exception that ends a run at once, like SIGKILL: nothing in the package handles it."""


def kill_at(step):
    """Returns an `on_step` that ends the run after `step` steps, before the next one."""

    def on_step(completed_steps):
        if completed_steps == step:
            raise Killed

    return on_step


def stop_at(step, signum=signal.SIGTERM):
    """Returns an `on_step` that sends this process a signal after `step` steps."""

    def on_step(completed_steps):
        if completed_steps == step:
            signal.raise_signal(signum)

    return on_step


@functools.cache
def build_vqgan_stage(config):
    """Returns stage 1 of a config without a folder, on the devices of the config."""
    return VQGANStage(config, loop.Devices(config.devices))


@functools.cache
def init_state(stage):
    """Returns the initial state of a stage from `vqgan_stage`."""
    return jax.tree.map(np.asarray, stage.init(jax.random.key(stage.config.seed)))


def make_config(workdir, **settings):
    """Returns a config with the given settings, which are named `data__path` for `data.path`."""
    overrides = {name.replace("__", "."): value for name, value in settings.items()}
    return load_config("mnist_tiny", SETTINGS | overrides | {"workdir": workdir and str(workdir)})


def train(workdir, stage="vqgan", on_step=lambda completed_steps: None, draw=False, **settings):
    """Trains a stage of `small_config`. Calls `on_step` with the number of completed steps before
    each step. Draws figures only with `draw`."""
    config = make_config(workdir, **settings)

    def build(config, devices, restart=False):
        if stage == "prior":
            built_stage = PriorStage(config, devices)
        else:
            built_stage = build_vqgan_stage(dataclasses.replace(config, workdir=None))
        return ObservedStage(built_stage, config.workdir, on_step, draw)

    loop.train(build, config)


class ObservedStage:
    """A stage that calls a function before each step, and draws figures only with `draw`."""

    def __init__(self, stage, workdir, on_step, draw):
        self._stage, self._on_step, self._draw = stage, on_step, draw
        self.config = dataclasses.replace(stage.config, workdir=workdir)

    def __getattr__(self, name):
        return getattr(self._stage, name)

    def init(self, key):
        if not isinstance(self._stage, VQGANStage):
            return self._stage.init(key)
        return jax.tree.map(jnp.array, init_state(self._stage))

    def compile(self, *_):
        """Does nothing. The first step compiles the programs, and later runs reuse them."""

    def train_step(self, state, batch):
        self._on_step(batch.step)
        return self._stage.train_step(state, batch)

    def draw_figures(self, *arguments):
        if self._draw:
            self._stage.draw_figures(*arguments)


def list_saved_steps(workdir, stage="vqgan"):
    return Store(workdir, stage).steps()


def read_arrays(workdir, step, stage="vqgan"):
    return Store(workdir, stage).read(step).arrays


def read_rows(workdir, stage="vqgan"):
    lines = (workdir / "metrics" / f"{stage}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_arrays(arrays, expected):
    """Checks that arrays are equal bit for bit."""
    assert set(arrays) == set(expected) and len(arrays) > 50
    for path, array in expected.items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=".".join(path))


def assert_same_run(workdir, expected, step, stage="vqgan"):
    """Checks that a checkpoint and the log of two runs are equal bit for bit."""
    assert_same_arrays(read_arrays(workdir, step, stage), read_arrays(expected, step, stage))
    assert read_rows(workdir, stage) == read_rows(expected, stage)


def assert_rows_close(rows, expected, tolerance):
    """Checks that rows of logs have the same keys and nearly the same values."""
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys() and row["split"] == other["split"]
        for key in row.keys() - {"split"}:
            assert row[key] == pytest.approx(other[key], rel=tolerance), key
