import functools

import jax
import numpy as np
import pytest
from PIL import Image

from taming_jax.config.load import load_config
from taming_jax.data import datasets
from taming_jax.data.datasets import Split
from taming_jax.errors import UserError
from taming_jax.metrics import classifier, features
from taming_jax.metrics.features import Features, load_vgg, resize_clean
from taming_jax.models.lpips import load_lpips, vgg_features
from taming_jax.parallel.devices import Devices
from tests.degraded_images import measure_distances
from tests.weights.torch_writer import write_tensors

MNIST = datasets.load(load_config("mnist_tiny").data)


def test_vgg_features_are_the_mean_of_the_last_lpips_features(monkeypatch):
    images = MNIST.test.images[:5]
    expected = vgg_features(load_lpips()["vgg"], images / np.float32(127.5) - 1)[-1].mean((1, 2))
    vgg, probabilities = Features(load_vgg(), Devices(1))(images)
    np.testing.assert_allclose(vgg, expected, rtol=1e-4, atol=1e-6)
    assert probabilities.shape == (5, 0)


def test_features_do_not_depend_on_devices_or_other_images():
    images = MNIST.test.images[:40]
    one = Features(load_vgg(), Devices(1))(images)[0]
    four = Features(load_vgg(), Devices(4))(images)[0]
    np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(Features(load_vgg(), Devices(1))(images[7:9])[0], one[7:9])


def test_resizing_equals_pillows_per_channel_in_float32():
    images = np.random.default_rng(0).integers(0, 256, (2, 70, 80, 3)).astype(np.uint8)
    resized = resize_clean(images, 32)
    plane = Image.fromarray(images[1, ..., 2].astype(np.float32))
    expected = np.asarray(plane.resize((32, 32), Image.Resampling.BICUBIC)).clip(0, 255)
    np.testing.assert_array_equal(resized[1, ..., 2], expected)
    assert resize_clean(images[:, :32, :32], 32).dtype == np.uint8


@pytest.mark.slow
def test_distances_increase_with_blur_and_noise():
    images = MNIST.train.images[datasets.evenly_spaced(len(MNIST.train.images), 120)]
    results = list(measure_distances(images, Features(load_vgg(), Devices(1))).values())
    for term in ("FD", "KD"):
        values = [result[term] for result in results]
        assert values == sorted(values) and values[1] > 1.05 * values[0], (term, values)
    assert results[0]["1 - recall"] < 0.5 < results[-1]["1 - recall"]


@pytest.mark.slow
def test_the_digit_classifier_is_accurate_and_cached(tmp_path, monkeypatch):
    """The test trains on few images without their margins. It compiles with full optimization, as
    users do, because the steps take longer than the compilation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"xla_backend_optimization_level": 3}
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
    test = MNIST.test.images[:320, 4:24, 4:24]
    rows = datasets.evenly_spaced(len(MNIST.train.images), 2560)
    train = Split(MNIST.train.images[rows, 4:24, 4:24], MNIST.train.labels[rows])
    extractor = features.load_digit_classifier(train, 10)
    _, probabilities = Features(extractor, Devices(1))(test)
    assert (probabilities.argmax(1) == MNIST.test.labels[:320]).mean() > 0.8
    monkeypatch.setattr(classifier, "train_classifier", None)  # the file is read instead
    cached = features.load_digit_classifier(train, 10)
    assert cached.weights == extractor.weights
    (file,) = (tmp_path / "taming_jax").glob("classifier-*.npz")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TypeError):  # a damaged file would be replaced by training
        features.load_digit_classifier(train, 10)


def test_files_without_inceptions_weights_are_refused(tmp_path):
    file = tmp_path / "other.pth"
    for content in ({"fc.weight": np.zeros((3, 2))}, {"epoch": 3}, {"model": {}}):
        write_tensors(file, content)
        with pytest.raises(UserError, match=r"does not have InceptionV3's weights"):
            features.load_inception(file)


def test_weights_that_cannot_be_downloaded_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(features.urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"put the file at .*pt_inception.* or use --features vgg"):
        features.load_pretrained("inception", None, False)
    assert features.load_pretrained("auto", None, False).name == "VGG16"
    assert jax.tree.leaves(features.load_pretrained("vgg", None, False).params)
