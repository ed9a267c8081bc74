"""Batches for the devices.

A split of n examples is read as an endless stream, in which the example at position p is
`permute_epoch(seed, p // n)[p % n]`. Batches cross the ends of epochs, so every shape is static,
every example occurs once per epoch, and the number of a step alone determines its batch.
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
    """The input of one step.

    `step` is the number of the step on the host, by which a stage chooses among compiled steps.
    `arrays` is the input of the compiled step, from which `gather_batch` takes the examples:

    - `images` uint8 [n,h,w,c] and `labels` int32 [n].
    - `index` int32 [b]: the rows of the examples. Without it, every row is an example.
    - `place` int32 [b], in training: an example's position in the batch of all devices, from which
      its random keys derive.
    - `weight` float32 [b], in evaluation: 0 for examples that only fill up the last batch, else 1.
    """

    step: int
    arrays: dict[str, Any]


@functools.lru_cache(maxsize=4)
def permute_epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of an epoch. NumPy draws it, so that it is the same on every device."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def locate_examples(seed: int, n: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epochs and the examples, int32 [count] each, of positions start .. start + count
    - 1 of the stream."""
    positions = np.arange(start, start + count)
    epochs, offsets = np.divmod(positions, n)
    index = np.empty(count, np.int32)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        index[mask] = permute_epoch(seed, int(epoch), n)[offsets[mask]]
    return epochs.astype(np.int32), index


class Feed(abc.ABC):
    """A split in batches of `batch_size`, shuffled by `seed`.

    This class determines the examples of each batch, and its subclasses send them to the devices.
    """

    def __init__(self, size: int, batch_size: int, seed: int, devices: Devices):
        self.size, self.batch_size = size, batch_size
        self._seed, self._devices = seed, devices
        self._own_slice = devices.get_local_rows(batch_size)

    def _locate_rows(self, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Returns the rows of the images that hold the examples `index` in `epochs`."""
        return index

    def _select_training(self, step: int) -> dict[str, np.ndarray]:
        first = step * self.batch_size
        index = self._locate_rows(*locate_examples(self._seed, self.size, first, self.batch_size))
        place = np.arange(self.batch_size, dtype=np.int32)
        return {"index": index[self._own_slice], "place": place[self._own_slice]}

    def _select_evaluation(self, number: int) -> dict[str, np.ndarray]:
        first = number * self.batch_size
        index = np.arange(first, first + self.batch_size, dtype=np.int32)[self._own_slice]
        weight = (index < self.size).astype(np.float32)
        return {"index": np.minimum(index, self.size - 1), "weight": weight}

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """Returns the batch of training step `step`, counted from 0."""

    @abc.abstractmethod
    def iterate_once(self) -> Generator[Batch, None, None]:
        """Yields every example once, in order, in batches of the same size."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stops reading ahead."""


class ResidentFeed(Feed):
    """A feed that keeps the split on the devices as uint8, so that a batch only sends indices."""

    def __init__(self, split: Split, batch_size: int, seed: int, devices: Devices):
        super().__init__(len(split.images), batch_size, seed, devices)
        self._resident: dict[str, Any] = devices.replicate(split._asdict())

    def batch(self, step: int) -> Batch:
        return Batch(step, self._resident | self._devices.shard(self._select_training(step)))

    def iterate_once(self) -> Generator[Batch, None, None]:
        for number in range(-(-self.size // self.batch_size)):
            shards = self._devices.shard(self._select_evaluation(number))
            yield Batch(number, self._resident | shards)

    def close(self) -> None:
        """Does nothing, since this feed does not read ahead."""


class StreamingFeed(Feed):
    """A feed that leaves the split where it is, usually on the disk.

    Grain's threads read batches ahead of the step and send them to the devices. The batches and
    their order are the same as those of `ResidentFeed`.

    The feed uses threads, since reading decoded images is a copy that releases Python's lock.
    Worker processes were four times slower in our measurements.
    """

    THREADS = 4  # also the number of batches that are read ahead

    def __init__(self, split: Split, batch_size: int, seed: int, devices: Devices):
        super().__init__(len(split.images), batch_size, seed, devices)
        self._split = split
        self._batches: Any = None
        self._next_step = 0

    def _read(self, select: Callable[[int], dict[str, np.ndarray]], start: int, stop: int) -> Any:
        """Returns an iterator over batches start .. stop - 1, whose indices `select` returns."""
        import grain

        def read(number: int) -> Batch:
            arrays = select(number)
            index = arrays.pop("index")
            # Indexing copies, so that a memory-mapped file is read here and not in the step.
            images, labels = (np.asarray(part)[index] for part in self._split)
            arrays |= {"images": images, "labels": labels}
            return Batch(number, self._devices.shard(arrays))

        options = grain.ReadOptions(num_threads=self.THREADS, prefetch_buffer_size=self.THREADS)
        return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))

    def batch(self, step: int) -> Batch:
        if self._batches is None or step != self._next_step:
            self.close()
            self._batches = self._read(self._select_training, step, 2**31)
        self._next_step = step + 1
        return next(self._batches)

    def iterate_once(self) -> Generator[Batch, None, None]:
        batches = self._read(self._select_evaluation, 0, -(-self.size // self.batch_size))
        with contextlib.closing(batches):
            yield from batches

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None


def build_feed(
    split: Split, batch_size: int, seed: int, devices: Devices, resident_share: float
) -> Feed:
    """Builds the feed of a split.

    The feed is resident if the images take at most the fraction `resident_share` of a device's
    memory, and streaming otherwise.
    """
    fits = split.images.nbytes <= resident_share * devices.memory
    return (ResidentFeed if fits else StreamingFeed)(split, batch_size, seed, devices)


def gather_batch(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns a batch's images uint8 [b,h,w,c] (or codes) and labels [b]; called inside a step."""
    if "index" not in arrays:
        return arrays["images"], arrays["labels"]
    return arrays["images"][arrays["index"]], arrays["labels"][arrays["index"]]
