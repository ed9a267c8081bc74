"""Pixel values: uint8 in 0..255 at rest, float in [-1, 1] inside models."""

from typing import TypeVar

import jax
import numpy as np

Images = TypeVar("Images", np.ndarray, jax.Array)


def to_float(images: Images) -> Images:
    """uint8 in 0..255 as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(images: Images) -> Images:
    """Floats in [-1, 1], clipped to that, as uint8; uint8 as it is."""
    if images.dtype == np.uint8:
        return images
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
