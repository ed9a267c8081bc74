"""Batches for the devices.

A split is read as one endless stream: example p of it is `permutation(seed, p // n)[p % n]`.
Batches run across the ends of epochs, so every shape is static, every example comes once an epoch,
and the number of a step alone says what the step reads.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from taming_jax.data.sources import Split


class Batch(NamedTuple):
    """What one step reads. `step` is the host's number of the step (how a stage chooses among
    compiled steps); `arrays` is what the compiled step is called with: `images` uint8 [n,h,w,c]
    and `labels` int32 [n], of which the examples are those at `index` int32 [b]; in training
    `place` int32 [b] is an example's place in the batch of all devices, for its random keys; in
    evaluation `weight` float32 [b] is 0 for the examples that only fill the last batch."""

    step: int
    arrays: dict[str, Any]


class Placement(Protocol):
    """Puts arrays on the devices; train/devices.py has the one that is used."""

    def replicate(self, tree: Any) -> Any: ...
    def shard(self, tree: Any) -> Any: ...


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of an epoch. NumPy's, so that it is the same on every kind of device."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def stream(seed: int, n: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The epochs and the examples of positions start .. start + count - 1 of the stream, int32
    [count] each."""
    positions = np.arange(start, start + count)
    epochs, places = np.divmod(positions, n)
    index = np.empty(count, np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        index[here] = permutation(seed, int(epoch), n)[places[here]]
    return epochs.astype(np.int32), index


class ResidentFeed:
    """A whole split on the devices as uint8; a batch is then only the indices of its examples."""

    def __init__(self, split: Split, batch_size: int, seed: int, placement: Placement):
        self.size = len(split.images)
        self.batch_size = batch_size
        self._seed = seed
        self._placement = placement
        self._resident: dict[str, Any] = placement.replicate(split._asdict())

    def _index(self, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Where the examples of the stream lie among the resident ones."""
        return index

    def batch(self, step: int) -> Batch:
        """The batch of step `step` (the first is 0) of training."""
        index = self._index(*stream(
            self._seed, self.size, step * self.batch_size, self.batch_size
        ))  # fmt: skip
        place = np.arange(self.batch_size, dtype=np.int32)
        return Batch(step, self._resident | self._placement.shard({"index": index, "place": place}))

    def once(self) -> Iterator[Batch]:
        """Every example once, in order, in batches of one size."""
        for step, start in enumerate(range(0, self.size, self.batch_size)):
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            weight = (index < self.size).astype(np.float32)
            index = np.minimum(index, self.size - 1)
            shards = self._placement.shard({"index": index, "weight": weight})
            yield Batch(step, self._resident | shards)


def take(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Inside a step: a batch's images uint8 [b,h,w,c] (or its grids of codes) and labels [b]."""
    return arrays["images"][arrays["index"]], arrays["labels"][arrays["index"]]


def to_float(images: jax.Array) -> jax.Array:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0
