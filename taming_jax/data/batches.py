"""Batches of examples on the devices.

A split of n examples is read as an endless stream, in which the example at position p is
`permute_epoch(seed, p // n, n)[p % n]`. A batch may span two epochs, so all batches have the same
shape, every example occurs once per epoch, and the step number alone determines the batch.
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
    """The input of one step, or of `steps` steps, whose `index` and `place` are then [steps,b].

    `step` is the number of the (first) step, kept on the host so that a stage can choose between
    compiled steps. `arrays` is the input of the compiled step, from which `gather_batch` takes the
    examples:

    - `images` uint8 [n,h,w,c] and `labels` int32 [n].
    - `index` int32 [b]: the rows of the examples. Without it, the batch consists of all rows.
    - `place` int32 [b], in training: the position of each example in the global batch, which
      determines its random keys.
    - `weight` float32 [b], in evaluation: 0 for examples that only pad the last batch, else 1.
    """

    step: int
    arrays: dict[str, Any]
    steps: int = 1


@functools.lru_cache(maxsize=4)
def permute_epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of n examples in an epoch. NumPy draws it, so it is the same on all
    devices."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def locate_examples(seed: int, n: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epoch and the example, int32 [count] each, at every position of the stream from
    `start` to `start + count - 1`."""
    positions = np.arange(start, start + count)
    epochs, offsets = np.divmod(positions, n)
    index = np.empty(count, np.int32)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        index[mask] = permute_epoch(seed, int(epoch), n)[offsets[mask]]
    return epochs.astype(np.int32), index


class Feed(abc.ABC):
    """The base class of feeds, which read a split in batches of `batch_size`, shuffled by `seed`.

    This class selects the examples of each batch, and its subclasses send them to the devices.
    """

    def __init__(self, size: int, batch_size: int, seed: int, devices: Devices):
        self.size, self.batch_size = size, batch_size
        self._seed, self._devices = seed, devices
        self._own_slice = devices.get_local_rows(batch_size)

    def _locate_rows(self, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Returns the rows that hold the examples `index` [n] in the epochs `epochs` [n]."""
        return index

    def _select_training(self, step: int) -> dict[str, np.ndarray]:
        start = step * self.batch_size
        index = self._locate_rows(*locate_examples(self._seed, self.size, start, self.batch_size))
        place = np.arange(self.batch_size, dtype=np.int32)
        return {"index": index[self._own_slice], "place": place[self._own_slice]}

    def _select_evaluation(self, number: int) -> dict[str, np.ndarray]:
        start = number * self.batch_size
        index = np.arange(start, start + self.batch_size, dtype=np.int32)[self._own_slice]
        weight = (index < self.size).astype(np.float32)
        return {"index": np.minimum(index, self.size - 1), "weight": weight}

    @abc.abstractmethod
    def batch(self, step: int, steps: int = 1) -> Batch:
        """Returns the batch of training step `step`, counted from 0, or of `steps` steps from there
        on if the feed is resident."""

    @abc.abstractmethod
    def iterate_once(self) -> Generator[Batch, None, None]:
        """Yields every example once, in order. The last batch is padded to the batch size."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stops reading ahead."""


class ResidentFeed(Feed):
    """A feed that keeps the split on the devices and sends only indices per batch."""

    def __init__(self, split: Split, batch_size: int, seed: int, devices: Devices):
        super().__init__(len(split.images), batch_size, seed, devices)
        self._resident: dict[str, Any] = devices.replicate(split._asdict())

    def batch(self, step: int, steps: int = 1) -> Batch:
        if steps == 1:
            shards = self._devices.shard(self._select_training(step))
        else:
            selected = [self._select_training(number) for number in range(step, step + steps)]
            stacked = {name: np.stack([x[name] for x in selected]) for name in selected[0]}
            shards = self._devices.shard(stacked, axis=1)
        return Batch(step, self._resident | shards, steps)

    def iterate_once(self) -> Generator[Batch, None, None]:
        for number in range(-(-self.size // self.batch_size)):
            shards = self._devices.shard(self._select_evaluation(number))
            yield Batch(number, self._resident | shards)

    def close(self) -> None:
        """Does nothing, since this feed does not read ahead."""


class StreamingFeed(Feed):
    """A feed that leaves the split on the host, usually in memory-mapped files.

    Grain's threads read batches ahead of time and send them to the devices. `ResidentFeed` returns
    the same batches in the same order.

    The feed uses threads because reading decoded images is a copy that releases the GIL. Worker
    processes were four times slower in our measurements.
    """

    THREADS = 4  # also the number of batches that are read ahead

    def __init__(self, split: Split, batch_size: int, seed: int, devices: Devices):
        super().__init__(len(split.images), batch_size, seed, devices)
        self._split = split
        self._batches: Any = None
        self._next_step = 0

    def _read(self, select: Callable[[int], dict[str, np.ndarray]], start: int, stop: int) -> Any:
        """Returns an iterator over batches start to stop - 1. `select` selects their examples."""
        import grain

        def read(number: int) -> Batch:
            arrays = select(number)
            index = arrays.pop("index")
            # Indexing copies, so a memory-mapped file is read here and not during the step.
            images, labels = (np.asarray(part)[index] for part in self._split)
            arrays |= {"images": images, "labels": labels}
            return Batch(number, self._devices.shard(arrays))

        options = grain.ReadOptions(num_threads=self.THREADS, prefetch_buffer_size=self.THREADS)
        return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))

    def batch(self, step: int, steps: int = 1) -> Batch:
        assert steps == 1
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
    """Returns the images uint8 [b,h,w,c] (or codes) and labels [b] of a batch, inside a step."""
    if "index" not in arrays:
        return arrays["images"], arrays["labels"]
    return arrays["images"][arrays["index"]], arrays["labels"][arrays["index"]]
