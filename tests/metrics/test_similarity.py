import numpy as np
import pytest
from scipy import ndimage

from taming_jax.metrics import similarity

RNG = np.random.default_rng(0)
X = RNG.random((3, 28, 30, 2)).astype(np.float32)
Y = np.clip(X + 0.1 * RNG.normal(size=X.shape), 0, 1).astype(np.float32)


def test_psnr_equals_its_definition():
    expected = -10 * np.log10(np.square(X.astype(float) - Y).mean((1, 2, 3)))
    np.testing.assert_allclose(similarity.psnr(X, Y), expected, rtol=1e-5)
    np.testing.assert_allclose(similarity.psnr(X, X), 100)


def compute_plain_ssim(x, y):
    """Returns the SSIM of one channel in float64, as scikit-image computes it."""

    def blur(a):
        return ndimage.gaussian_filter(a, 1.5, truncate=3.5, mode="reflect")

    x, y = x.astype(float), y.astype(float)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    ssim /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return ssim[5:-5, 5:-5].mean()


@pytest.mark.parametrize("flat", [False, True])
def test_ssim_equals_that_of_scikit_image(flat):
    """The test includes images that hardly vary, for which float32 loses the most precision."""
    x, y = (0.9 + 0.01 * images if flat else images for images in (X, Y))
    expected = [
        np.mean([compute_plain_ssim(a[..., c], b[..., c]) for c in range(2)])
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(similarity.ssim(x, y), expected, rtol=1e-4)
    np.testing.assert_allclose(similarity.ssim(x, x), 1, rtol=1e-6)
