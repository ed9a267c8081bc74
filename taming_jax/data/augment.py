"""Augmentation on the devices: pure functions of images and of a key an image.

Where training images are cropped at random, a source gives them an eighth larger than the model
sees (`stored_size`). Everything else sees their middle.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.config import DataConfig

Images = TypeVar("Images", np.ndarray, jax.Array)


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
