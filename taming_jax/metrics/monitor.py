"""A small evaluation while a stage trains."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.data.datasets import Split, spread
from taming_jax.errors import UserError
from taming_jax.metrics.distances import Moments, frechet_distance
from taming_jax.metrics.features import MICRO, Features, vgg
from taming_jax.models.vqgan import images_at_once
from taming_jax.parallel.devices import Devices

MOST = 2000  # images


def ranks(labels: np.ndarray) -> np.ndarray:
    """The number of each image within its class, int32 [n], from classes int [n]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    numbers = np.empty(len(labels), np.int32)
    numbers[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return numbers


class Monitor:
    """The Fréchet distance, in VGG16's features, of what a stage makes for a split's images (at
    most 2,000 of them, evenly) to these. Raises UserError for a split of fewer than two, and where
    LPIPS's weights are missing."""

    def __init__(self, split: Split, config: Config, devices: Devices):
        if len(split.images) < 2:
            raise UserError(
                f"the validation split has {len(split.images)} images, and a distance needs two: "
                "leave --vqgan.fd-every and --prior.fd-every out, or raise --data.validation-share."
            )
        self._split, self._devices = split, devices
        self._rows = spread(len(split.images), MOST)
        self._numbers = ranks(split.labels[self._rows])
        self._size = images_at_once(config.data.image_size**2, MICRO) * len(devices)
        self.features = Features(vgg(), devices)
        self._known: Moments | None = None

    def distance(self, make: Callable[[dict[str, Any]], jax.Array]) -> float:
        """Of the images uint8 [b,h,w,c] that `make` makes of a batch on the devices: `images` uint8
        [b,h,w,c], their `labels` and `numbers` int32 [b]."""
        if self._known is None:
            self._known = self._moments(lambda rows: self._split.images[rows])

        def made(rows: np.ndarray) -> np.ndarray:
            labels = self._split.labels[rows].astype(np.int32)
            batch = {
                "images": self._split.images[rows],
                "labels": labels,
                "numbers": self._numbers[np.searchsorted(self._rows, rows)],
            }
            devices = self._devices
            return devices.in_batches(lambda own: make(devices.shard(own)), batch, self._size)

        return frechet_distance(self._moments(made), self._known)

    def _moments(self, images: Callable[[np.ndarray], np.ndarray]) -> Moments:
        found, size = Moments(), self.features.size
        for start in range(0, len(self._rows), size):
            found.add(self.features(images(self._rows[start : start + size]))[0])
        return found
