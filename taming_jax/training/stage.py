"""What the loop needs of a stage of the pipeline."""

from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.data.batches import Batch, Feed
from taming_jax.training.state import TrainState


class Stage(Protocol):
    """A stage of the pipeline, as the loop needs it.

    `config` is what it was built from, with what is decided when a run is created. `dataset` is
    the fingerprint of its data (data/datasets.py), `learned` names the networks that it trains.
    `best_metric` names the metric of a validation that chooses the best checkpoint, lower being
    better. `eval_step` returns sums over a batch, and `summarise` turns their sum over the split
    into metrics: perplexity, say, cannot be averaged over batches. `distance` is called only when
    the settings have `fd_every`. `compile` is called before the first step, with a training batch
    and a validation batch; after that, `flops(step)` returns the operations that this step, counted
    from 0, does on one device. The metrics of a step include `skipped`, the number of steps skipped
    so far; figures and logs take whatever else there is.
    """

    config: Config
    name: str
    best_metric: str
    learned: tuple[str, ...]
    dataset: dict[str, Any]

    def feeds(self) -> tuple[Feed, Feed]: ...
    def init(self, key: jax.Array) -> TrainState: ...
    def compile(self, state: TrainState, training: Batch, validation: Batch) -> None: ...
    def flops(self, step: int) -> float | None: ...
    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]: ...
    def eval_step(self, state: TrainState, batch: Batch) -> dict[str, Any]: ...
    def summarise(self, sums: dict[str, np.ndarray]) -> dict[str, float]: ...
    def distance(self, state: TrainState) -> float: ...
    def draw(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None: ...
