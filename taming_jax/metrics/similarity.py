"""How like two images are, from their pixels: float [b,h,w,c] in [0, 1], one number an image."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WINDOW = 11  # pixels a side of SSIM's Gaussian window, whose deviation is 1.5


def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, [b]; of equal images 100."""
    error = jnp.square(images - others).reshape(len(images), -1).mean(-1)
    return -10 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(images: jax.Array, others: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al. 2004) [b], with the paper's Gaussian window where it lies
    within the image, averaged over places and channels: what scikit-image returns with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`. h and w of at
    least 11."""
    taps = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).astype(np.float32)

    def blurred(x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        for shape in ((WINDOW, 1), (1, WINDOW)):
            kernel = jnp.broadcast_to(taps.reshape(*shape, 1, 1), (*shape, 1, c))
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=c, precision="highest",
            )  # fmt: skip
        return x

    # About the middle, where squares lose less.
    x, y = images - 0.5, others - 0.5
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return found.reshape(len(found), -1).mean(-1)
