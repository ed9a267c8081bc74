"""A small evaluation while a stage trains."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.data.datasets import Split, evenly_spaced
from taming_jax.errors import UserError
from taming_jax.metrics.distances import Moments, frechet_distance, moments
from taming_jax.metrics.features import MICRO, Features, vgg
from taming_jax.models.vqgan import max_batch
from taming_jax.parallel.devices import Devices

MOST = 2000  # images


def ranks(labels: np.ndarray) -> np.ndarray:
    """The number of each image within its class, int32 [n], from classes int [n]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    numbers = np.empty(len(labels), np.int32)
    numbers[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return numbers


class ValidationFD:
    """The Fréchet distance, in VGG16's features, of the images that a stage makes for a validation
    split to the split's own (at most 2,000 of them, evenly spread). Raises UserError for a split of
    fewer than two images, and where LPIPS's weights are missing."""

    def __init__(self, split: Split, config: Config, devices: Devices):
        if len(split.images) < 2:
            raise UserError(
                f"the validation split has {len(split.images)} images, and a distance needs two: "
                "leave --vqgan.fd-every and --prior.fd-every out, or raise --data.validation-share."
            )
        rows = evenly_spaced(len(split.images), MOST)
        labels = split.labels[rows].astype(np.int32)
        self._batch = {"images": split.images[rows], "labels": labels, "numbers": ranks(labels)}
        self._devices, self.features = devices, Features(vgg(), devices)
        self._size = max_batch(config.data.image_size**2, MICRO) * len(devices)
        self._reference: Moments | None = None

    def distance(self, make: Callable[[dict[str, Any]], jax.Array]) -> float:
        """Of the images uint8 [b,h,w,c] that `make` makes of a batch on the devices: `images` uint8
        [b,h,w,c], their `labels` and `numbers` int32 [b]."""
        devices = self._devices
        made = devices.in_batches(lambda own: make(devices.shard(own)), self._batch, self._size)
        if self._reference is None:
            self._reference = moments(self.features(self._batch["images"])[0])
        return frechet_distance(moments(self.features(made)[0]), self._reference)
