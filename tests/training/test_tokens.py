import dataclasses

import jax
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.data import datasets
from taming_jax.data.augment import augment
from taming_jax.data.batches import gather_batch, permute_epoch
from taming_jax.data.datasets import Split
from taming_jax.models.vqgan import build_vqgan, encode
from taming_jax.parallel.devices import Devices
from taming_jax.training import tokens
from taming_jax.training.state import AUGMENTATION, make_example_keys
from taming_jax.training.tokens import TokenFeed, Tokenizer

CONFIG = load_config(
    "mnist_tiny",
    {
        "data.name": "synthetic",
        "data.image_size": 8,
        "vqgan.channels": 4,
        "vqgan.multipliers": (1,),
        "vqgan.discriminator_start": 1.0,
    },
)


@pytest.fixture(scope="module")
def generator():
    model = build_vqgan(CONFIG)
    images = np.zeros((1, 8, 8, 1), np.float32)
    return model, jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), images)["params"])


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(tokens, "IMAGES_PER_FILE", 100)


SPLIT = Split(*(part[:250] for part in datasets.load(CONFIG.data).train))


def encoded(folder, generator, split=SPLIT, count=1, say=print, config=CONFIG, version=0):
    tokenizer = Tokenizer(folder, *generator, config, Devices(count), say)
    return tokenizer("train", split, version)


def files(folder):
    return sorted(folder.rglob("*.npz"))


def test_codes_are_the_generators_in_raster_order(tmp_path, generator):
    model, params = generator
    codes, labels = encoded(tmp_path, generator)
    images = SPLIT.images / np.float32(127.5) - 1
    expected = jax.jit(lambda p, x: encode(model, p, x).indices)(params, images)
    assert codes.shape == (250, 64) and codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, np.asarray(expected).reshape(250, 64))
    np.testing.assert_array_equal(labels, SPLIT.labels)
    assert len(files(tmp_path)) == 3


def test_what_is_encoded_is_read_and_only_what_is_missing_encoded(tmp_path, generator, monkeypatch):
    codes, _ = encoded(tmp_path, generator)
    first, second, third = files(tmp_path)
    times = {file: file.stat().st_mtime_ns for file in (first, third)}
    second.unlink()
    np.testing.assert_array_equal(encoded(tmp_path, generator).images, codes)
    assert {file: file.stat().st_mtime_ns for file in times} == times and second.exists()
    monkeypatch.setattr(Devices, "compile", None)  # nothing is computed now
    np.testing.assert_array_equal(encoded(tmp_path, generator).images, codes)


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_damaged_file_is_encoded_again(tmp_path, generator, harm):
    codes, _ = encoded(tmp_path, generator)
    first, *_ = files(tmp_path)
    content = bytearray(first.read_bytes())
    if harm == "flip":
        content[len(content) // 3] ^= 1
    first.write_bytes(content[:-9] if harm == "truncate" else content)
    said = []
    np.testing.assert_array_equal(encoded(tmp_path, generator, say=said.append).images, codes)
    assert said == ["Encoding train: 100 images."]
    said.clear()
    encoded(tmp_path, generator, say=said.append)
    assert said == [] and len(files(tmp_path)) == 3


def test_another_generator_or_other_images_never_read_what_is_stale(tmp_path, generator):
    model, params = generator
    encoded(tmp_path, generator)
    changed = jax.tree.map(np.array, params)
    changed["encoder"]["conv_in"]["bias"][0] += 1e-3
    encoded(tmp_path, (model, changed))
    other = Split(np.roll(SPLIT.images, 1, 0), SPLIT.labels)
    codes, _ = encoded(tmp_path, generator, other)
    assert len(list(tmp_path.iterdir())) == 3
    np.testing.assert_array_equal(codes[1:], encoded(tmp_path, generator).images[:-1])


def test_a_disk_that_takes_no_codes_is_no_trouble(tmp_path, generator, limit_file_size):
    expected = encoded(tmp_path / "kept", generator)
    limit_file_size(1000)
    np.testing.assert_array_equal(encoded(tmp_path / "full", generator).images, expected.images)
    assert files(tmp_path / "full") == []


def test_an_encoding_that_is_stopped_keeps_its_whole_files(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(tokens, "max_batch", lambda *_: 50)  # two batches a file
    gather, left = Devices.gather, [None] * 3

    def stopped(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return gather(*arguments)

    monkeypatch.setattr(Devices, "gather", stopped)
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path, generator)
    monkeypatch.setattr(Devices, "gather", gather)
    (first,) = files(tmp_path)
    time = first.stat().st_mtime_ns
    assert len(encoded(tmp_path, generator).images) == 250
    assert first.stat().st_mtime_ns == time


def test_four_devices_encode_the_same(tmp_path, generator):
    codes, _ = encoded(tmp_path / "1", generator)
    np.testing.assert_array_equal(encoded(tmp_path / "4", generator, count=4).images, codes)


AUGMENTED = dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, random_crop=True, mirror=True)
)


def test_augmented_versions_are_encoded_when_they_are_read(tmp_path, generator):
    model, params = generator
    large = Split(*(part[:250] for part in datasets.load(AUGMENTED.data).train))
    tokenizer = Tokenizer(tmp_path, model, params, AUGMENTED, Devices(1))
    feed = TokenFeed(tokenizer, "train", large, 100, versions=3)
    assert len(files(tmp_path)) == 3, "the first version is enough to begin"
    expected = [encoded(tmp_path / "again", generator, large, config=AUGMENTED).images]
    through = jax.jit(lambda p, x: encode(model, p, x).indices)
    for version in (1, 2):
        keys = make_example_keys(CONFIG.seed, AUGMENTATION, version, np.arange(250))
        images = np.asarray(augment(large.images, keys, AUGMENTED.data))
        codes = through(params, images / np.float32(127.5) - 1)
        expected.append(np.asarray(codes).reshape(250, 64))
    assert all((expected[0] != other).any() for other in expected[1:])
    for step in (0, 2, 4, 6, 7, 8):  # the third batch crosses into the second epoch
        codes, labels = gather_batch(feed.batch(step).arrays)
        for i, p in enumerate(range(100 * step, 100 * step + 100)):
            example = permute_epoch(CONFIG.seed, p // 250, 250)[p % 250]
            np.testing.assert_array_equal(codes[i], expected[p // 250 % 3][example])
            assert labels[i] == large.labels[example]
        versions = min((100 * step + 99) // 250, 2) + 1
        assert len(files(tmp_path)) == 3 * versions + 3
    assert [len(gather_batch(b.arrays)[0]) for b in feed.iterate_once()] == [100, 100, 100]
