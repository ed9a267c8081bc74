"""The Fréchet distance that validation computes during training."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.data.datasets import Split, evenly_spaced
from taming_jax.errors import UserError
from taming_jax.metrics.distances import Moments, compute_moments, frechet_distance
from taming_jax.metrics.features import MICRO_BATCH, Features, load_vgg
from taming_jax.models.vqgan import max_batch
from taming_jax.parallel.devices import Devices

MAX_IMAGES = 2000


def number_within_classes(labels: np.ndarray) -> np.ndarray:
    """Returns the number of each image within its class, int32 [n], given the labels int [n]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    numbers = np.empty(len(labels), np.int32)
    numbers[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return numbers


class ValidationFD:
    """The Fréchet distance, from VGG16's features, between the images of a validation split (at
    most 2,000, evenly spaced) and those that a stage generates for it.

    Raises UserError if the split has fewer than two images, or if LPIPS's weights are missing.
    """

    def __init__(self, split: Split, config: Config, devices: Devices):
        if len(split.images) < 2:
            raise UserError(
                "the validation split has only one image, but a distance needs two; "
                "omit --vqgan.fd-every and --prior.fd-every, or increase --data.validation-share."
            )
        rows = evenly_spaced(len(split.images), MAX_IMAGES)
        labels = split.labels[rows].astype(np.int32)
        self._batch = {
            "images": split.images[rows],
            "labels": labels,
            "numbers": number_within_classes(labels),
        }
        self._devices, self.features = devices, Features(load_vgg(), devices)
        self._size = max_batch(config.data.image_size**2, MICRO_BATCH) * len(devices)
        self._reference: Moments | None = None

    def compute(self, generate: Callable[[dict[str, Any]], jax.Array]) -> float:
        """Computes the distance from the split to the images uint8 [b,h,w,c] that `generate`
        returns for its sharded batches of `images` uint8 [b,h,w,c], `labels` and `numbers` int32
        [b]."""
        devices = self._devices
        images = devices.map_batches(
            lambda rows: generate(devices.shard(rows)), self._batch, self._size
        )
        if self._reference is None:
            self._reference = compute_moments(self.features(self._batch["images"])[0])
        return frechet_distance(compute_moments(self.features(images)[0]), self._reference)
