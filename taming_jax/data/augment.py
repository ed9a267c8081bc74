"""Augmentation on the devices, as pure functions of images and one random key per image.

If training images are cropped at random, a source stores them an eighth larger than the model sees
them (`get_stored_size`). All other images are stored at the size that the model sees.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from taming_jax.config.schema import DataConfig
from taming_jax.data.pixels import Images


def uses_augmentation(config: DataConfig) -> bool:
    """Returns whether training images are augmented."""
    return config.random_crop or config.mirror


def get_stored_size(config: DataConfig) -> int:
    """Returns the height and width at which a source stores its training images."""
    return config.image_size * 9 // 8 if config.random_crop else config.image_size


def center_crop(images: Images, size: int) -> Images:
    """Crops images [b,h,w,c] to their center [b,size,size,c]."""
    top, left = ((n - size) // 2 for n in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def augment(images: jax.Array, keys: jax.Array, config: DataConfig) -> jax.Array:
    """Crops and mirrors training images [b,h,w,c] at random, with one key per image in `keys` [b].

    Returns images [b,image_size,image_size,c], or `images` unchanged if augmentation is off.
    """

    def augment_one(image: jax.Array, key: jax.Array) -> jax.Array:
        crop_key, mirror_key = jax.random.split(key)
        if config.random_crop:
            size = config.image_size
            top, left = jax.random.randint(
                crop_key, (2,), 0, jnp.array([n - size + 1 for n in image.shape[:2]])
            )
            image = jax.lax.dynamic_slice(image, (top, left, 0), (size, size, image.shape[2]))
        if config.mirror:
            image = jnp.where(jax.random.bernoulli(mirror_key), image[:, ::-1], image)
        return image

    return jax.vmap(augment_one)(images, keys) if uses_augmentation(config) else images


def jitter_color(image: jax.Array, key: jax.Array) -> jax.Array:
    """Changes the brightness, saturation and contrast of an image [h,w,c] at random."""
    brightness, saturation, contrast = jax.random.uniform(key, (3,))
    image = image + brightness - 0.5
    gray = image.mean(-1, keepdims=True)
    image = (image - gray) * 2 * saturation + gray
    mean = image.mean()
    return (image - mean) * (contrast + 0.5) + mean


def translate(image: jax.Array, key: jax.Array) -> jax.Array:
    """Shifts an image [h,w,c] at random by up to an eighth of its size and pads it with zeros."""
    h, w, c = image.shape
    rows, columns = h // 8, w // 8
    padded = jnp.pad(image, ((rows, rows), (columns, columns), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, jnp.array([2 * rows + 1, 2 * columns + 1]))
    return jax.lax.dynamic_slice(padded, (top, left, 0), (h, w, c))


def cut_out(image: jax.Array, key: jax.Array) -> jax.Array:
    """Sets a random window of an image [h,w,c] to zero.

    The window has half the image's height and width, rounded up. Its center lies anywhere in the
    image, so part of the window may lie outside the image.
    """
    height, width, _ = image.shape
    sizes = (height + 1) // 2, (width + 1) // 2
    # The center of a window of even size lies between two pixels or on the image's edge.
    ends = [n + 1 - size % 2 for n, size in zip((height, width), sizes, strict=True)]
    starts = jax.random.randint(key, (2,), 0, jnp.array(ends)) - jnp.array(sizes) // 2
    rows, columns = (
        (jnp.arange(n) >= start) & (jnp.arange(n) < start + size)
        for n, size, start in zip((height, width), sizes, starts, strict=True)
    )
    return jnp.where((rows[:, None] & columns)[..., None], 0.0, image)


DIFF_AUGMENTATIONS = {"color": jitter_color, "translation": translate, "cutout": cut_out}


def diff_augment(images: jax.Array, keys: jax.Array, kinds: Sequence[str]) -> jax.Array:
    """Augments the discriminator's images, real and fake alike (DiffAugment, arXiv 2006.10738).

    `images` are float [b,h,w,c] in [-1, 1], `keys` [b] holds one key per image, and `kinds` are
    keys of `DIFF_AUGMENTATIONS`. The result is differentiable with respect to the images.
    """

    def augment_one(image: jax.Array, key: jax.Array) -> jax.Array:
        for kind, kind_key in zip(kinds, jax.random.split(key, len(kinds)), strict=True):
            image = DIFF_AUGMENTATIONS[kind](image, kind_key)
        return image

    return jax.vmap(augment_one)(images, keys) if kinds else images
