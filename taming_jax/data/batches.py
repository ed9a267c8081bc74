"""Batches for the devices.

A split is read as one endless stream: example p of it is `permutation(seed, p // n)[p % n]`.
Batches run across the ends of epochs, so every shape is static, every example comes once an epoch,
and the number of a step alone says what the step reads.
"""

import abc
import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.data.datasets import Split
from taming_jax.parallel.devices import Devices


class Batch(NamedTuple):
    """What one step reads. `step` is the host's number of the step (how a stage chooses among
    compiled steps); `arrays` is what the compiled step takes, and `gather_batch` reads:
    `images` uint8 [n,h,w,c] and `labels` int32 [n], of which the examples are those at `index`
    int32 [b], or, without an index, the examples themselves; in training `place` int32 [b] is an
    example's place in the batch of all devices, for its random keys; in evaluation `weight`
    float32 [b] is 0 for the examples that only fill the last batch."""

    step: int
    arrays: dict[str, Any]


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


class Feed(abc.ABC):
    """A split in batches of `batch_size`, by the order of `seed`: which examples each one holds.
    How they reach the devices is its subclasses' matter."""

    def __init__(self, size: int, batch_size: int, seed: int, devices: Devices):
        self.size, self.batch_size = size, batch_size
        self._seed, self._devices = seed, devices
        self._own = devices.get_local_rows(batch_size)

    def _index(self, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Where the examples of the stream lie."""
        return index

    def _training(self, step: int) -> dict[str, np.ndarray]:
        first = step * self.batch_size
        index = self._index(*stream(self._seed, self.size, first, self.batch_size))
        place = np.arange(self.batch_size, dtype=np.int32)
        return {"index": index[self._own], "place": place[self._own]}

    def _evaluation(self, number: int) -> dict[str, np.ndarray]:
        first = number * self.batch_size
        index = np.arange(first, first + self.batch_size, dtype=np.int32)[self._own]
        weight = (index < self.size).astype(np.float32)
        return {"index": np.minimum(index, self.size - 1), "weight": weight}

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of step `step` (the first is 0) of training."""

    @abc.abstractmethod
    def iterate_once(self) -> Generator[Batch, None, None]:
        """Every example once, in order, in batches of one size."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stops reading ahead."""


class ResidentFeed(Feed):
    """A whole split on the devices as uint8; a batch is then only the indices of its examples."""

    def __init__(self, split: Split, batch_size: int, seed: int, devices: Devices):
        super().__init__(len(split.images), batch_size, seed, devices)
        self._resident: dict[str, Any] = devices.replicate(split._asdict())

    def batch(self, step: int) -> Batch:
        return Batch(step, self._resident | self._devices.shard(self._training(step)))

    def iterate_once(self) -> Generator[Batch, None, None]:
        for number in range(-(-self.size // self.batch_size)):
            shards = self._devices.shard(self._evaluation(number))
            yield Batch(number, self._resident | shards)

    def close(self) -> None:
        """Nothing is read ahead."""


class StreamingFeed(Feed):
    """A split that stays where it is, on the disk as a rule: grain's threads read batches ahead of
    the step, and send them to the devices. The batches, and their order, are ResidentFeed's.

    Threads, since reading decoded images is copying, which holds no lock of Python's: worker
    processes were four times slower here."""

    THREADS = 4  # and batches that are read ahead

    def __init__(self, split: Split, batch_size: int, seed: int, devices: Devices):
        super().__init__(len(split.images), batch_size, seed, devices)
        self._split = split
        self._reading: Any = None
        self._next = 0  # the step that is read next

    def _read(self, choose: Callable[[int], dict[str, np.ndarray]], start: int, stop: int) -> Any:
        """An iterator over batches `start` .. `stop` - 1, `choose` returning their indices."""
        import grain

        def read(number: int) -> Batch:
            arrays = choose(number)
            index = arrays.pop("index")
            # An index copies: a mapped file is read here, not in the step.
            images, labels = (np.asarray(part)[index] for part in self._split)
            arrays |= {"images": images, "labels": labels}
            return Batch(number, self._devices.shard(arrays))

        options = grain.ReadOptions(num_threads=self.THREADS, prefetch_buffer_size=self.THREADS)
        return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))

    def batch(self, step: int) -> Batch:
        if self._reading is None or step != self._next:
            self.close()
            self._reading = self._read(self._training, step, 2**31)
        self._next = step + 1
        return next(self._reading)

    def iterate_once(self) -> Generator[Batch, None, None]:
        batches = self._read(self._evaluation, 0, -(-self.size // self.batch_size))
        with contextlib.closing(batches):
            yield from batches

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()
        self._reading = None


def feed(split: Split, batch_size: int, seed: int, devices: Devices, resident_share: float) -> Feed:
    """A split's feed: resident where it takes no more than a share of a device's memory."""
    fits = split.images.nbytes <= resident_share * devices.memory
    return (ResidentFeed if fits else StreamingFeed)(split, batch_size, seed, devices)


def gather_batch(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Inside a step: a batch's images uint8 [b,h,w,c] (or its grids of codes) and labels [b]."""
    if "index" not in arrays:
        return arrays["images"], arrays["labels"]
    return arrays["images"][arrays["index"]], arrays["labels"][arrays["index"]]
