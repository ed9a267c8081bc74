"""A small evaluation while a stage trains."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax.data.sources import Split, spread
from taming_jax.evaluation.distances import Moments, frechet_distance
from taming_jax.evaluation.features import Features, vgg
from taming_jax.train.devices import Devices

MOST = 2000  # images


class Monitor:
    """The Fréchet distance, in VGG16's features, of what a stage makes for a split's images (at
    most 2,000 of them, evenly) to these. Raises UserError where LPIPS's weights are missing."""

    def __init__(self, split: Split, devices: Devices):
        self._split, self._devices = split, devices
        self._rows = spread(len(split.images), MOST)
        self._features = Features(vgg(), devices)
        self._known: Moments | None = None

    def distance(self, make: Callable[[dict[str, Any]], jax.Array]) -> float:
        """Of the images uint8 [b,h,w,c] that `make` makes of a batch on the devices: `images` uint8
        [b,h,w,c], their `labels` and `numbers` int32 [b]."""
        size = self._features.size
        own, known, made = self._devices.own(size), Moments(), Moments()
        for start in range(0, len(self._rows), size):
            rows = self._rows[start : start + size]
            filled = rows[np.minimum(np.arange(size), len(rows) - 1)]
            batch = {
                "images": self._split.images[filled[own]],
                "labels": self._split.labels[filled[own]].astype(np.int32),
                "numbers": filled[own].astype(np.int32),
            }
            answered = self._devices.gather(make(self._devices.shard(batch)))
            made.add(self._features(answered[: len(rows)])[0])
            if self._known is None:
                known.add(self._features(self._split.images[rows])[0])
        self._known = self._known or known
        return frechet_distance(made, self._known)
