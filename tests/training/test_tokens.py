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


def encode_split(folder, generator, split=SPLIT, count=1, say=print, config=CONFIG, version=0):
    tokenizer = Tokenizer(folder, *generator, config, Devices(count), say)
    return tokenizer("train", split, version)


def list_files(folder):
    return sorted(folder.rglob("*.npz"))


def test_codes_are_those_of_the_generator_in_raster_order(tmp_path, generator):
    model, params = generator
    codes, labels = encode_split(tmp_path, generator)
    images = SPLIT.images / np.float32(127.5) - 1
    expected = jax.jit(lambda p, x: encode(model, p, x).indices)(params, images)
    assert codes.shape == (250, 64) and codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, np.asarray(expected).reshape(250, 64))
    np.testing.assert_array_equal(labels, SPLIT.labels)
    assert len(list_files(tmp_path)) == 3


def test_encoded_files_are_reused_and_only_missing_files_are_encoded(
    tmp_path, generator, monkeypatch
):
    codes, _ = encode_split(tmp_path, generator)
    first, second, third = list_files(tmp_path)
    times = {file: file.stat().st_mtime_ns for file in (first, third)}
    second.unlink()
    np.testing.assert_array_equal(encode_split(tmp_path, generator).images, codes)
    assert {file: file.stat().st_mtime_ns for file in times} == times and second.exists()
    monkeypatch.setattr(Devices, "compile", None)  # nothing may be computed now
    np.testing.assert_array_equal(encode_split(tmp_path, generator).images, codes)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_file_is_encoded_again(tmp_path, generator, damage):
    codes, _ = encode_split(tmp_path, generator)
    first, *_ = list_files(tmp_path)
    content = bytearray(first.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 1
    first.write_bytes(content[:-9] if damage == "truncate" else content)
    messages = []
    np.testing.assert_array_equal(
        encode_split(tmp_path, generator, say=messages.append).images, codes
    )
    assert messages == ["Encoding train: 100 images."]
    messages.clear()
    encode_split(tmp_path, generator, say=messages.append)
    assert messages == [] and len(list_files(tmp_path)) == 3


def test_another_generator_or_other_images_do_not_read_stale_codes(tmp_path, generator):
    model, params = generator
    encode_split(tmp_path, generator)
    changed_params = jax.tree.map(np.array, params)
    changed_params["encoder"]["conv_in"]["bias"][0] += 1e-3
    encode_split(tmp_path, (model, changed_params))
    other_split = Split(np.roll(SPLIT.images, 1, 0), SPLIT.labels)
    codes, _ = encode_split(tmp_path, generator, other_split)
    assert len(list(tmp_path.iterdir())) == 3
    np.testing.assert_array_equal(codes[1:], encode_split(tmp_path, generator).images[:-1])


def test_codes_that_cannot_be_written_are_still_returned(tmp_path, generator, limit_file_size):
    expected = encode_split(tmp_path / "kept", generator)
    limit_file_size(1000)
    np.testing.assert_array_equal(
        encode_split(tmp_path / "full", generator).images, expected.images
    )
    assert list_files(tmp_path / "full") == []


def test_an_interrupted_encoding_keeps_its_complete_files(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(tokens, "max_batch", lambda *_: 50)  # two batches per file
    gather, remaining = Devices.gather, [None] * 3

    def gather_or_interrupt(*arguments):
        if not remaining:
            raise KeyboardInterrupt
        remaining.pop()
        return gather(*arguments)

    monkeypatch.setattr(Devices, "gather", gather_or_interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_split(tmp_path, generator)
    monkeypatch.setattr(Devices, "gather", gather)
    (first,) = list_files(tmp_path)
    modified = first.stat().st_mtime_ns
    assert len(encode_split(tmp_path, generator).images) == 250
    assert first.stat().st_mtime_ns == modified


def test_four_devices_compute_the_same_codes(tmp_path, generator):
    codes, _ = encode_split(tmp_path / "1", generator)
    np.testing.assert_array_equal(encode_split(tmp_path / "4", generator, count=4).images, codes)


AUGMENTED = dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, random_crop=True, mirror=True)
)


def test_augmented_versions_are_encoded_on_first_use(tmp_path, generator):
    model, params = generator
    large = Split(*(part[:250] for part in datasets.load(AUGMENTED.data).train))
    tokenizer = Tokenizer(tmp_path, model, params, AUGMENTED, Devices(1))
    feed = TokenFeed(tokenizer, "train", large, 100, versions=3)
    assert len(list_files(tmp_path)) == 3, "the feed needs only the first version to start"
    expected = [encode_split(tmp_path / "again", generator, large, config=AUGMENTED).images]
    encode_images = jax.jit(lambda p, x: encode(model, p, x).indices)
    for version in (1, 2):
        keys = make_example_keys(CONFIG.seed, AUGMENTATION, version, np.arange(250))
        images = np.asarray(augment(large.images, keys, AUGMENTED.data))
        codes = encode_images(params, images / np.float32(127.5) - 1)
        expected.append(np.asarray(codes).reshape(250, 64))
    assert all((expected[0] != version_codes).any() for version_codes in expected[1:])
    for step in (0, 2, 4, 6, 7, 8):  # the third batch crosses into the second epoch
        codes, labels = gather_batch(feed.batch(step).arrays)
        for i, position in enumerate(range(100 * step, 100 * step + 100)):
            example = permute_epoch(CONFIG.seed, position // 250, 250)[position % 250]
            np.testing.assert_array_equal(codes[i], expected[position // 250 % 3][example])
            assert labels[i] == large.labels[example]
        versions = min((100 * step + 99) // 250, 2) + 1
        assert len(list_files(tmp_path)) == 3 * versions + 3
    assert [len(gather_batch(b.arrays)[0]) for b in feed.iterate_once()] == [100, 100, 100]
