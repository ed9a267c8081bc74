import jax
import numpy as np
import pytest

from taming_jax.config import load_config
from taming_jax.data import sources
from taming_jax.data.sources import Split
from taming_jax.models.vqgan import build_vqgan, encode
from taming_jax.train import tokens
from taming_jax.train.devices import Devices

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
    monkeypatch.setattr(tokens, "FILE", 100)


SPLIT = Split(*(part[:250] for part in sources.load(CONFIG.data).train))


def encoded(folder, generator, split=SPLIT, count=1, say=print):
    return tokens.encoded(folder, "train", split, *generator, Devices(count), say)


def files(folder):
    return sorted(folder.rglob("*.npy"))


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


@pytest.mark.parametrize("harm", ["flip", "truncate", "swap"])
def test_a_damaged_file_is_named_and_encoded_again(tmp_path, generator, harm):
    codes, _ = encoded(tmp_path, generator)
    first, second, _ = files(tmp_path)
    content = bytearray(first.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
    first.write_bytes(content[:-9] if harm == "truncate" else content)
    if harm == "swap":
        first.write_bytes(second.read_bytes())
    said = []
    np.testing.assert_array_equal(encoded(tmp_path, generator, say=said.append).images, codes)
    assert said == [f"The token file {first} is damaged; its images are encoded again."]
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


def test_four_devices_encode_the_same(tmp_path, generator):
    codes, _ = encoded(tmp_path / "1", generator)
    np.testing.assert_array_equal(encoded(tmp_path / "4", generator, count=4).images, codes)


def test_the_smallest_unsigned_type_that_holds_the_codes():
    sizes = {2: "uint8", 256: "uint8", 257: "uint16", 65536: "uint16", 65537: "uint32"}
    assert {n: tokens.smallest_unsigned(n).name for n in sizes} == sizes
