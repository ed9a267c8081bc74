"""Conversion of pixel values: uint8 in 0..255 in storage, float in [-1, 1] inside models."""

from typing import TypeVar

import jax
import numpy as np

Images = TypeVar("Images", np.ndarray, jax.Array)


def to_float(images: Images) -> Images:
    """Converts uint8 in 0..255 to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(images: Images) -> Images:
    """Clips floats to [-1, 1] and converts them to uint8 in 0..255. Returns uint8 unchanged."""
    if images.dtype == np.uint8:
        return images
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
