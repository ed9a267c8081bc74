"""Augmentation on the devices: pure functions of images and of a key an image.

Where training images are cropped at random, a source gives them an eighth larger than the model
sees (`stored_size`). Everything else sees their middle.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from taming_jax.config.schema import DataConfig
from taming_jax.data.pixels import Images


def augments(config: DataConfig) -> bool:
    """Whether training images are augmented at all."""
    return config.random_crop or config.mirror


def stored_size(config: DataConfig) -> int:
    """Height and width of a source's training images."""
    return config.image_size * 9 // 8 if config.random_crop else config.image_size


def centred(images: Images, size: int) -> Images:
    """The middle [b,size,size,c] of images [b,h,w,c]."""
    top, left = ((n - size) // 2 for n in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def augmented(images: jax.Array, keys: jax.Array, config: DataConfig) -> jax.Array:
    """Images [b,h,w,c], with a key [b] each, as training sees them: [b,size,size,c]."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        for_crop, for_mirror = jax.random.split(key)
        if config.random_crop:
            size = config.image_size
            top, left = jax.random.randint(
                for_crop, (2,), 0, jnp.array([n - size + 1 for n in image.shape[:2]])
            )
            image = jax.lax.dynamic_slice(image, (top, left, 0), (size, size, image.shape[2]))
        if config.mirror:
            image = jnp.where(jax.random.bernoulli(for_mirror), image[:, ::-1], image)
        return image

    return jax.vmap(one)(images, keys) if augments(config) else images


def color(image: jax.Array, key: jax.Array) -> jax.Array:
    """Brightness, saturation and contrast of an image [h,w,c] changed at random."""
    brightness, saturation, contrast = jax.random.uniform(key, (3,))
    image = image + brightness - 0.5
    gray = image.mean(-1, keepdims=True)
    image = (image - gray) * 2 * saturation + gray
    mean = image.mean()
    return (image - mean) * (contrast + 0.5) + mean


def translation(image: jax.Array, key: jax.Array) -> jax.Array:
    """An image [h,w,c] moved by up to an eighth of its size; what comes in is 0."""
    h, w, c = image.shape
    rows, columns = h // 8, w // 8
    padded = jnp.pad(image, ((rows, rows), (columns, columns), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, jnp.array([2 * rows + 1, 2 * columns + 1]))
    return jax.lax.dynamic_slice(padded, (top, left, 0), (h, w, c))


def cutout(image: jax.Array, key: jax.Array) -> jax.Array:
    """An image [h,w,c] with a window of half its height and width, rounded up, at 0. Its centre is
    anywhere in the image, so that a part of it may lie outside."""
    height, width, _ = image.shape
    sizes = (height + 1) // 2, (width + 1) // 2
    # A window of even size has its centre between two pixels, or at either edge.
    ends = [n + 1 - size % 2 for n, size in zip((height, width), sizes, strict=True)]
    starts = jax.random.randint(key, (2,), 0, jnp.array(ends)) - jnp.array(sizes) // 2
    rows, columns = (
        (jnp.arange(n) >= start) & (jnp.arange(n) < start + size)
        for n, size, start in zip((height, width), sizes, starts, strict=True)
    )
    return jnp.where((rows[:, None] & columns)[..., None], 0.0, image)


DIFFERENTIABLE = {"color": color, "translation": translation, "cutout": cutout}


def diff_augmented(images: jax.Array, keys: jax.Array, kinds: Sequence[str]) -> jax.Array:
    """Images float [b,h,w,c] in [-1, 1] as a discriminator is to see them, real and fake alike
    (DiffAugment, arXiv 2006.10738), with a key [b] each: the gradient goes through."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        for kind, of_kind in zip(kinds, jax.random.split(key, len(kinds)), strict=True):
            image = DIFFERENTIABLE[kind](image, of_kind)
        return image

    return jax.vmap(one)(images, keys) if kinds else images
