import jax
import numpy as np

from taming_jax.data import feeds
from taming_jax.data.sources import Split
from taming_jax.train.devices import Devices

SPLIT = Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10, dtype=np.int32))


def examples(feed, step):
    images, labels = jax.jit(feeds.take)(feed.batch(step).arrays)
    assert images.dtype == np.uint8 and (images.ravel() == labels).all()
    return labels.tolist()


def test_every_example_comes_once_an_epoch_and_batches_cross_epochs():
    feed = feeds.ResidentFeed(SPLIT, 4, 0, Devices(1))
    seen = [label for step in range(5) for label in examples(feed, step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:], "each epoch has an order of its own"


def test_a_steps_number_alone_says_what_it_reads():
    feed = feeds.ResidentFeed(SPLIT, 4, 3, Devices(1))
    late = examples(feed, 7)
    assert examples(feeds.ResidentFeed(SPLIT, 4, 3, Devices(1)), 7) == late
    assert examples(feeds.ResidentFeed(SPLIT, 4, 4, Devices(1)), 7) != late
    # The stream by its definition: example p is permutation(seed, p // n)[p % n].
    by_hand = [feeds.permutation(3, p // 10, 10)[p % 10] for p in range(28, 32)]
    assert late == by_hand


def test_once_reads_each_example_once():
    feed = feeds.ResidentFeed(SPLIT, 4, 0, Devices(1))
    batches = list(feed.once())
    assert [batch.arrays["weight"].sum() for batch in batches] == [4, 4, 2]
    kept = [
        label
        for batch in batches
        for label, weight in zip(feeds.take(batch.arrays)[1], batch.arrays["weight"], strict=True)
        if weight
    ]
    assert kept == list(range(10))


def test_uint8_to_float_reaches_both_ends():
    values = feeds.to_float(np.array([0, 255], np.uint8))
    assert values.tolist() == [-1.0, 1.0] and values.dtype == np.float32
