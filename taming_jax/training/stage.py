"""The base class of the two training stages: the interface that the training loop uses."""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from taming_jax.config.schema import Config, StageConfig
from taming_jax.data import datasets
from taming_jax.data.batches import Batch, Feed
from taming_jax.data.fingerprints import hash_splits, load_and_check
from taming_jax.errors import RunFailed
from taming_jax.metrics.monitor import ValidationFD
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Compiled, Devices, resolve_dtype
from taming_jax.training.accumulate import count_loop_iterations
from taming_jax.training.state import Metrics, TrainState


def select_dtype(config: Config, created: Config | None) -> Config:
    """Returns the config with a dtype other than auto: that of the config with which the run was
    created, if there is one, otherwise the one that suits the devices of the primary process."""
    dtype = config.dtype if created is None or config.dtype != "auto" else created.dtype
    resolved: Any = distributed.run_on_primary(lambda: resolve_dtype(dtype))
    return dataclasses.replace(config, dtype=resolved)


class Stage(abc.ABC):
    """A training stage.

    `learned` names the networks that the stage trains, and `figures` the files that `draw_figures`
    writes. `best_metric` names the validation metric that chooses the best checkpoint; lower is
    better. `dataset` is the fingerprint of the data
    (fingerprints.py) with the hashes of the images. `config` is the run's config, including the
    values that are fixed when a run is created. `frozen` holds the parameters of the networks that
    the stage uses, but does not train, and that its checkpoints refer to. `evaluation` computes
    sums over a batch of the validation split for `summarize`.
    """

    name: ClassVar[str]
    best_metric: ClassVar[str]
    learned: ClassVar[tuple[str, ...]]
    figures: ClassVar[tuple[str, ...]]
    evaluation: Compiled

    def __init__(self, config: Config, devices: Devices, frozen: Mapping[str, Any] | None = None):
        self.frozen = frozen or {}
        self.config, self.devices = config, devices
        settings = self.settings
        devices.check_batch(self.name, settings.batch_size, settings.micro_batches)
        self.splits, fingerprint = load_and_check(lambda: datasets.load(config.data))
        self.dataset = fingerprint | {"hashes": hash_splits(self.splits)}
        self.steps = settings.total_steps(len(self.splits.train.images))
        self._monitor: ValidationFD | None = None
        if settings.fd_every:
            self._monitor = ValidationFD(self.splits.validation, config, devices)
        self._make_images = devices.compile(self.make_images)

    @property
    def settings(self) -> StageConfig:
        """The stage's section of the config."""
        return getattr(self.config, self.name)

    @functools.cached_property
    def _placed_frozen(self) -> dict[str, Any]:
        return self.devices.replicate(dict(self.frozen))

    @property
    def steps_per_dispatch(self) -> int:
        """The number of steps per call of `train_step`, unless something is due before."""
        return 1

    @abc.abstractmethod
    def build_feeds(self) -> tuple[Feed, Feed]:
        """Returns the feeds of the training and the validation split."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> TrainState:
        """Returns a freshly initialized state on one device."""

    @abc.abstractmethod
    def select_step(self, step: int, steps: int = 1) -> Compiled:
        """Returns the compiled training step for step number `step`, counted from 0, or for `steps`
        steps from there on if the stage takes several steps per dispatch. Its metrics include
        `skipped`, the number of steps skipped so far. All metrics appear in the log, and all but
        `skipped` in the figures."""

    @abc.abstractmethod
    def make_images(self, params: dict[str, Any], arrays: dict[str, jax.Array]) -> jax.Array:
        """Returns images uint8 [b,h,w,c] made with the parameters of each network. `arrays` is a
        batch of validation `images`, with their `labels` and `numbers` int32 [b]."""

    @abc.abstractmethod
    def summarize(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns the metrics of a split from the sums over its batches. Metrics such as perplexity
        cannot be averaged over batches."""

    @abc.abstractmethod
    def draw_figures(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        """Writes the stage's `figures` from the state, a validation's sums, and the log's rows."""

    def compile(self, state: TrainState, training: Sequence[Batch], validation: Batch) -> None:
        """Compiles the evaluation, and the steps that a run needs from these training batches on:
        one batch for each number of steps per dispatch."""
        for batch in training:
            for step in {self.select_step(n, batch.steps) for n in (batch.step, self.steps - 1)}:
                step.prepare(state, batch.arrays)
        self.evaluation.prepare(state, validation.arrays)

    def count_flops(self, step: int) -> float | None:
        """Returns the floating-point operations of a step on one device, or None if JAX cannot
        count them. Call this after `compile`."""
        flops = self.select_step(step).flops
        return flops and flops * count_loop_iterations(self.settings.micro_batches)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Returns the state after the steps of a batch, and their metrics. The old state is
        donated."""
        return self.select_step(batch.step, batch.steps)(state, batch.arrays)

    def eval_step(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Returns sums over a batch of the validation split for `summarize`."""
        return self.evaluation(state, batch.arrays)

    def compute_fd(self, state: TrainState) -> float:
        """Returns the Fréchet distance between the images of `make_images` and the validation
        split. This requires the setting `fd_every`."""
        assert self._monitor is not None
        params = {name: net.eval_params for name, net in state.nets.items()}
        params |= self._placed_frozen
        return self._monitor.compute(functools.partial(self._make_images, params))


@contextlib.contextmanager
def report_failures(folder: Path, stage: Stage) -> Iterator[None]:
    """A context for the steps of a stage that converts errors of the disk, and a lack of memory on
    the device, to RunFailed."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{error.filename or folder}: {error.strerror or error}.") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        batch = getattr(stage.config, stage.name).batch_size
        raise RunFailed(
            f"a step of {batch} images does not fit in the device's memory; lower "
            f"--{stage.name}.batch-size, raise --{stage.name}.micro-batches, or use more devices."
        ) from error
