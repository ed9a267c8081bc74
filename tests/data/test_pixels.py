import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.data.pixels import to_float, to_uint8


@pytest.mark.parametrize("module", [np, jnp])
def test_uint8_images_survive_conversion_to_float_and_back(module):
    values = module.arange(256, dtype=np.uint8)
    floats = to_float(values)
    assert floats.dtype == np.float32 and (floats[0], floats[-1]) == (-1, 1)
    expected = (np.arange(256) - 127.5) / 127.5
    np.testing.assert_allclose(floats, expected, atol=1e-7)
    pixels = to_uint8(floats)
    assert pixels.dtype == np.uint8
    assert (pixels == values).all() and (to_uint8(pixels) == values).all()


@pytest.mark.parametrize("module", [np, jnp])
def test_floats_are_clipped_and_rounded(module):
    values = module.array([-2.0, -1.0, 0.0, 0.005, 1.0, 2.0], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255]
