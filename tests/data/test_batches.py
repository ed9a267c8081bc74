import jax
import numpy as np
import pytest

from taming_jax.data import batches
from taming_jax.data.datasets import Split
from taming_jax.parallel.devices import Devices

SPLIT = Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10, dtype=np.int32))


def read_labels(feed, step):
    images, labels = jax.jit(batches.gather_batch)(feed.batch(step).arrays)
    assert images.dtype == np.uint8 and (images.ravel() == labels).all()
    return labels.tolist()


def test_every_example_is_read_once_per_epoch_and_batches_cross_epochs():
    feed = batches.ResidentFeed(SPLIT, 4, 0, Devices(1))
    seen = [label for step in range(5) for label in read_labels(feed, step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:], "each epoch has its own order"


def test_a_batch_depends_only_on_the_seed_and_the_step():
    feed = batches.ResidentFeed(SPLIT, 4, 3, Devices(1))
    labels = read_labels(feed, 7)
    assert read_labels(batches.ResidentFeed(SPLIT, 4, 3, Devices(1)), 7) == labels
    assert read_labels(batches.ResidentFeed(SPLIT, 4, 4, Devices(1)), 7) != labels
    # By definition, example p of the stream is permute_epoch(seed, p // n, n)[p % n].
    expected = [batches.permute_epoch(3, p // 10, 10)[p % 10] for p in range(28, 32)]
    assert labels == expected


def test_iterate_once_reads_each_example_once():
    feed = batches.ResidentFeed(SPLIT, 4, 0, Devices(1))
    all_batches = list(feed.iterate_once())
    assert [batch.arrays["weight"].sum() for batch in all_batches] == [4, 4, 2]
    labels = [
        label
        for batch in all_batches
        for label, weight in zip(
            batches.gather_batch(batch.arrays)[1], batch.arrays["weight"], strict=True
        )
        if weight
    ]
    assert labels == list(range(10))


@pytest.fixture
def mapped_split(tmp_path):
    """A split whose images are in a memory-mapped file."""
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3), np.uint8)
    images.tofile(tmp_path / "images.u8")
    images = np.memmap(tmp_path / "images.u8", np.uint8, "r", shape=images.shape)
    return Split(images, np.arange(50, dtype=np.int32))


def fetch_batch(batch, devices):
    """Returns the examples of a batch and their places or weights, as the devices see them."""
    arrays = dict(batch.arrays)
    examples = devices.compile(lambda _, arrays: batches.gather_batch(arrays))(
        devices.replicate(0), arrays
    )
    other_arrays = [arrays[name] for name in ("place", "weight") if name in arrays]
    return [devices.gather(x) for x in (*examples, *other_arrays)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_streaming_and_resident_feeds_give_the_same_batches(mapped_split, count):
    devices = Devices(count)
    feeds = [batches.build_feed(mapped_split, 8, 5, devices, share) for share in (0.2, 0.0)]
    assert [type(feed) for feed in feeds] == [batches.ResidentFeed, batches.StreamingFeed]
    steps = list(range(20))  # three epochs, and batches that cross their ends
    batch_lists = [[feed.batch(step) for step in steps] for feed in feeds]
    # The streaming feed prefetches training batches in the meantime.
    batch_lists += [list(feed.iterate_once()) for feed in feeds]
    for resident, streamed in zip(
        batch_lists[0] + batch_lists[2], batch_lists[1] + batch_lists[3], strict=True
    ):
        assert resident.step == streamed.step
        for one, other in zip(
            fetch_batch(resident, devices), fetch_batch(streamed, devices), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    feeds[1].close()


def test_a_streaming_feed_can_start_at_any_step(mapped_split):
    devices = Devices(1)
    streamed = batches.StreamingFeed(mapped_split, 8, 5, devices)
    for step in (0, 1, 1234, 1235, 3):
        resident = batches.ResidentFeed(mapped_split, 8, 5, devices)
        pairs = zip(
            fetch_batch(resident.batch(step), devices),
            fetch_batch(streamed.batch(step), devices),
            strict=True,
        )
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)
    streamed.close()
    streamed.close()


@pytest.mark.parametrize("feed_type", [batches.ResidentFeed, batches.StreamingFeed])
def test_each_process_reads_its_part_of_the_same_batch(mapped_split, feed_type, monkeypatch):
    devices, batches_per_process = Devices(1), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        feed = feed_type(mapped_split, 8, 5, devices)
        batches_per_process.append([feed.batch(9), *feed.iterate_once()])
        feed.close()
    monkeypatch.undo()
    full_feed = batches.ResidentFeed(mapped_split, 8, 5, Devices(1))
    for first, second, full in zip(
        *batches_per_process, [full_feed.batch(9), *full_feed.iterate_once()], strict=True
    ):
        for one, other, expected in zip(
            *(fetch_batch(batch, Devices(1)) for batch in (first, second, full)), strict=True
        ):
            np.testing.assert_array_equal(np.concatenate([one, other]), expected)
