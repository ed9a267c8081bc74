import numpy as np
import pytest
from scipy import ndimage

from taming_jax.metrics import similarity

RNG = np.random.default_rng(0)
X = RNG.random((3, 28, 30, 2)).astype(np.float32)
Y = np.clip(X + 0.1 * RNG.normal(size=X.shape), 0, 1).astype(np.float32)


def test_psnr():
    expected = -10 * np.log10(np.square(X.astype(float) - Y).mean((1, 2, 3)))
    np.testing.assert_allclose(similarity.psnr(X, Y), expected, rtol=1e-5)
    np.testing.assert_allclose(similarity.psnr(X, X), 100)


def plain_ssim(x, y):
    """As scikit-image computes one channel, in float64."""

    def blurred(a):
        return ndimage.gaussian_filter(a, 1.5, truncate=3.5, mode="reflect")

    x, y = x.astype(float), y.astype(float)
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return found[5:-5, 5:-5].mean()


@pytest.mark.parametrize("flat", [False, True])
def test_ssim(flat):
    """Also of images that hardly vary, where float32 loses most."""
    x, y = (0.9 + 0.01 * each if flat else each for each in (X, Y))
    expected = [
        np.mean([plain_ssim(a[..., c], b[..., c]) for c in range(2)])
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(similarity.ssim(x, y), expected, rtol=1e-4)
    np.testing.assert_allclose(similarity.ssim(x, x), 1, rtol=1e-6)
