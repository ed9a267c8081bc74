"""Tests of the functions and methods for notebooks."""

import subprocess
import sys

import numpy as np
import pytest

import taming_jax
from taming_jax.data import datasets
from taming_jax.errors import UserError


def test_importing_the_package_and_loading_a_config_imports_no_heavy_modules():
    code = (
        "import sys, taming_jax; taming_jax.load_config('mnist'); dir(taming_jax); "
        "print(sorted({'jax', 'flax', 'orbax', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    for name in taming_jax.__all__:
        assert callable(getattr(taming_jax, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = taming_jax.nothing


@pytest.fixture(scope="module")
def run(vqgan_workdir):
    """A run with gray images that was hardly trained."""
    return taming_jax.load_run(vqgan_workdir)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A run with color images, trained with pmap on two devices."""
    config = taming_jax.load_config(
        "mnist_tiny",
        {
            "data.name": "synthetic", "data.image_size": 16, "data.channels": 3, "devices": 2,
            "vqgan.multipliers": (1, 2), "vqgan.channels": 8, "vqgan.batch_size": 32,
            "vqgan.steps": 60, "vqgan.discriminator_start": 1.0, "vqgan.eval_every": 60,
            "workdir": str(tmp_path_factory.mktemp("run")),
        },
    )  # fmt: skip
    return taming_jax.load_run(taming_jax.train(config, "vqgan"))


@pytest.mark.slow
def test_a_run_reconstructs_images_that_it_has_not_seen(trained_run):
    run = trained_run
    images = datasets.load(run.config.data).test.images
    indices = run.encode(images)
    assert indices.shape == (64, 8, 8) and indices.dtype == np.int32
    reconstruction = run.reconstruct(images)
    assert reconstruction.shape == images.shape and reconstruction.dtype == np.uint8
    error = np.abs(reconstruction.astype(float) - images).mean() / 255
    blank = np.abs(images - images.mean((0, 1, 2))).mean() / 255
    assert error < 0.6 * blank


def test_reconstructions_have_the_dtype_of_the_images(run):
    images = datasets.load(run.config.data).test.images[:5]
    floats = images / np.float32(127.5) - 1
    np.testing.assert_array_equal(run.encode(floats), run.encode(images))
    reconstruction = run.reconstruct(floats)
    assert reconstruction.dtype == np.float32 and np.abs(reconstruction).max() <= 1
    decoded = run.decode(run.encode(images))
    np.testing.assert_allclose(decoded, reconstruction, atol=1e-6)
    byte_reconstruction = run.reconstruct(images).astype(float)
    np.testing.assert_allclose(byte_reconstruction, (reconstruction + 1) * 127.5, atol=0.51)


def test_images_are_encoded_the_same_in_one_batch_or_several(run):
    images = datasets.load(run.config.data).train.images[:70]
    together = run.encode(images)
    assert (together[65:] == run.encode(images[65:])).mean() > 0.99


def test_invalid_arguments_are_refused(run, tmp_path):
    for call, message in (
        (lambda: run.encode(np.zeros((16, 16, 1))), "the images have shape"),
        (
            lambda: run.encode(np.zeros((1, 28, 27, 1))),
            r"takes \[n, h, w, 1\], with h and w multiples of 2",
        ),
        (lambda: run.decode(np.zeros((1, 8, 8), int), tile=7), "the tile is 7 pixels"),
        (lambda: run.encode(np.zeros((0, 16, 16, 1))), "the batch is empty"),
        (lambda: run.encode(np.zeros((1, 16, 16, 1), int)), "the images have type int64"),
        (lambda: run.encode(np.full((1, 16, 16, 1), 2.0)), r"must lie in \[-1, 1\]"),
        (lambda: run.encode(np.full((1, 16, 16, 1), np.nan)), r"must lie in \[-1, 1\]"),
        (lambda: run.decode(np.zeros((1, 8, 8))), "takes integers"),
        (lambda: run.decode(np.zeros((1, 0, 0), int)), "the indices are empty"),
        (lambda: run.decode(np.full((1, 8, 8), 128)), "from 0 to 127"),
        (lambda: taming_jax.load_run(tmp_path), "holds no vqgan checkpoint"),
        (lambda: taming_jax.train(run.config, "vqgen"), "no stage 'vqgen'"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.slow
def test_training_writes_its_figures(trained_run):

    from PIL import Image

    run = trained_run
    names = {"loss_curves", "reconstructions", "codebook_usage", "random_latents", "codebook"}
    files = {file.stem: file for file in (run.workdir / "figures").iterdir()}
    assert set(files) == names
    for file in files.values():
        with Image.open(file) as image:
            assert min(image.size) > 300 and len(set(image.convert("L").tobytes())) > 10
