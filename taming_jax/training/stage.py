"""What the two stages of the pipeline have in common, and what the loop needs of them."""

import abc
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from taming_jax.config.schema import Config, StageConfig
from taming_jax.data import datasets
from taming_jax.data.batches import Batch, Feed
from taming_jax.metrics.monitor import ValidationFD
from taming_jax.parallel.devices import Compiled, Devices
from taming_jax.training.accumulate import repeated
from taming_jax.training.state import TrainState


class Stage(abc.ABC):
    """A stage of the pipeline, as the loop needs it.

    `learned` names the networks that it trains. `best_metric` names the metric of a validation that
    chooses the best checkpoint, lower being better. `dataset` is the fingerprint of its data
    (data/datasets.py), `config` what it was built from, with what is decided when a run is created.
    `evaluation` computes sums over a batch of the validation split, for `summarise`.
    """

    name: ClassVar[str]
    best_metric: ClassVar[str]
    learned: ClassVar[tuple[str, ...]]
    evaluation: Compiled

    def __init__(self, config: Config, devices: Devices):
        self.config, self.devices = config, devices
        settings = self.settings
        devices.check_batch(self.name, settings.batch_size, settings.micro_batches)
        self.splits, self.dataset = datasets.load_same(lambda: datasets.load(config.data))
        self.steps = settings.total_steps(len(self.splits.train.images))
        self._monitor: ValidationFD | None = None
        if settings.fd_every:
            self._monitor = ValidationFD(self.splits.validation, config, devices)
        self._make_images = devices.compile(self.make_images)

    @property
    def settings(self) -> StageConfig:
        """The stage's section of the config."""
        return getattr(self.config, self.name)

    @abc.abstractmethod
    def feeds(self) -> tuple[Feed, Feed]:
        """The training and the validation data."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> TrainState:
        """A fresh state, on one device."""

    @abc.abstractmethod
    def compiled_step(self, step: int) -> Compiled:
        """The training step that is number `step`, from 0, on the devices. Its metrics include
        `skipped`, the number of steps skipped so far; figures and logs take whatever else there
        is."""

    @abc.abstractmethod
    def make_images(self, params: dict[str, Any], arrays: dict[str, jax.Array]) -> jax.Array:
        """Images uint8 [b,h,w,c], by the parameters of each network, for a batch of validation
        `images`, their `labels` and `numbers` int32 [b]."""

    @abc.abstractmethod
    def summarise(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """The metrics of a split from the sum over its batches: perplexity, say, cannot be averaged
        over batches."""

    @abc.abstractmethod
    def draw(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        """Writes the stage's figures, from the state, a validation's sums, and the log's rows."""

    def compile(self, state: TrainState, training: Batch, validation: Batch) -> None:
        """Compiles the steps of a run from a training batch on, and the evaluation."""
        for step in {self.compiled_step(training.step), self.compiled_step(self.steps - 1)}:
            step.prepare(state, training.arrays)
        self.evaluation.prepare(state, validation.arrays)

    def flops(self, step: int) -> float | None:
        """The operations of a step on one device, after `compile`; None where JAX cannot tell."""
        flops = self.compiled_step(step).flops
        return flops and flops * repeated(self.settings.micro_batches)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """The state after a step, which gives up the one before, and the step's metrics."""
        return self.compiled_step(batch.step)(state, batch.arrays)

    def eval_step(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Sums over a batch of the validation split, for `summarise`."""
        return self.evaluation(state, batch.arrays)

    def distance(self, state: TrainState) -> float:
        """The Fréchet distance of `make_images` to the validation split, where the settings have
        `fd_every`."""
        assert self._monitor is not None
        params = {name: net.eval_params for name, net in state.nets.items()}
        return self._monitor.compute(functools.partial(self._make_images, params))
