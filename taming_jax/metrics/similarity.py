"""Pixel-based similarity of images float [b,h,w,c] in [0, 1]: one number per pair of images."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WINDOW = 11  # side of SSIM's Gaussian window in pixels; its standard deviation is 1.5


def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
    """Computes the peak signal-to-noise ratio [b] in dB; it is 100 for equal images."""
    error = jnp.square(images - others).reshape(len(images), -1).mean(-1)
    return -10 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(images: jax.Array, others: jax.Array) -> jax.Array:
    """Computes the structural similarity (Wang et al. 2004) [b] with the paper's Gaussian window,
    averaged over channels and the positions at which the window is inside the image.

    Matches scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1`. The height and width must be at least 11.
    """
    taps = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).astype(np.float32)

    def blur(x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        for shape in ((WINDOW, 1), (1, WINDOW)):
            kernel = jnp.broadcast_to(taps.reshape(*shape, 1, 1), (*shape, 1, c))
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=c, precision="highest",
            )  # fmt: skip
        return x

    # Centered at 0, since squares of smaller numbers lose less precision.
    x, y = images - 0.5, others - 0.5
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = 0.01**2, 0.03**2
    ssim_map = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    ssim_map /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return ssim_map.reshape(len(ssim_map), -1).mean(-1)
