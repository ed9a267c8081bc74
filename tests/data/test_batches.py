import jax
import numpy as np
import pytest

from taming_jax.data import batches
from taming_jax.data.datasets import Split
from taming_jax.parallel.devices import Devices

SPLIT = Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10, dtype=np.int32))


def examples(feed, step):
    images, labels = jax.jit(batches.gather_batch)(feed.batch(step).arrays)
    assert images.dtype == np.uint8 and (images.ravel() == labels).all()
    return labels.tolist()


def test_every_example_comes_once_an_epoch_and_batches_cross_epochs():
    feed = batches.ResidentFeed(SPLIT, 4, 0, Devices(1))
    seen = [label for step in range(5) for label in examples(feed, step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:], "each epoch has an order of its own"


def test_a_steps_number_alone_says_what_it_reads():
    feed = batches.ResidentFeed(SPLIT, 4, 3, Devices(1))
    late = examples(feed, 7)
    assert examples(batches.ResidentFeed(SPLIT, 4, 3, Devices(1)), 7) == late
    assert examples(batches.ResidentFeed(SPLIT, 4, 4, Devices(1)), 7) != late
    # The stream by its definition: example p is permute_epoch(seed, p // n)[p % n].
    by_hand = [batches.permute_epoch(3, p // 10, 10)[p % 10] for p in range(28, 32)]
    assert late == by_hand


def test_once_reads_each_example_once():
    feed = batches.ResidentFeed(SPLIT, 4, 0, Devices(1))
    read = list(feed.iterate_once())
    assert [batch.arrays["weight"].sum() for batch in read] == [4, 4, 2]
    kept = [
        label
        for batch in read
        for label, weight in zip(
            batches.gather_batch(batch.arrays)[1], batch.arrays["weight"], strict=True
        )
        if weight
    ]
    assert kept == list(range(10))


@pytest.fixture
def mapped(tmp_path):
    """A split whose images lie on the disk."""
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3), np.uint8)
    images.tofile(tmp_path / "images.u8")
    images = np.memmap(tmp_path / "images.u8", np.uint8, "r", shape=images.shape)
    return Split(images, np.arange(50, dtype=np.int32))


def taken(batch, devices):
    """A batch's examples and their places or weights, as the devices see them."""
    arrays = dict(batch.arrays)
    seen = devices.compile(lambda _, arrays: batches.gather_batch(arrays))(
        devices.replicate(0), arrays
    )
    rest = [arrays[name] for name in ("place", "weight") if name in arrays]
    return [devices.gather(x) for x in (*seen, *rest)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_streaming_and_resident_feeds_give_the_same_batches(mapped, count):
    devices = Devices(count)
    kinds = [batches.build_feed(mapped, 8, 5, devices, share) for share in (0.2, 0.0)]
    assert [type(kind) for kind in kinds] == [batches.ResidentFeed, batches.StreamingFeed]
    steps = list(range(20))  # three epochs, and batches that cross their ends
    read = [[kind.batch(step) for step in steps] for kind in kinds]
    read += [list(kind.iterate_once()) for kind in kinds]  # while training's are read ahead
    for resident, streamed in zip(read[0] + read[2], read[1] + read[3], strict=True):
        assert resident.step == streamed.step
        for one, other in zip(taken(resident, devices), taken(streamed, devices), strict=True):
            np.testing.assert_array_equal(one, other)
    kinds[1].close()


def test_a_streaming_feed_begins_at_any_step(mapped):
    devices = Devices(1)
    streamed = batches.StreamingFeed(mapped, 8, 5, devices)
    for step in (0, 1, 1234, 1235, 3):
        resident = batches.ResidentFeed(mapped, 8, 5, devices)
        pairs = zip(
            taken(resident.batch(step), devices), taken(streamed.batch(step), devices), strict=True
        )
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)
    streamed.close()
    streamed.close()


@pytest.mark.parametrize("kind", [batches.ResidentFeed, batches.StreamingFeed])
def test_processes_read_a_part_each_of_the_same_batch(mapped, kind, monkeypatch):
    devices, parts = Devices(1), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        feed = kind(mapped, 8, 5, devices)
        parts.append([feed.batch(9), *feed.iterate_once()])
        feed.close()
    monkeypatch.undo()
    whole = batches.ResidentFeed(mapped, 8, 5, Devices(1))
    for first, second, both in zip(*parts, [whole.batch(9), *whole.iterate_once()], strict=True):
        for one, other, expected in zip(
            *(taken(batch, Devices(1)) for batch in (first, second, both)), strict=True
        ):
            np.testing.assert_array_equal(np.concatenate([one, other]), expected)
