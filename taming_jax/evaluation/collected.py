"""What is kept of the features of a set of images, however large it is."""

from typing import NamedTuple

import numpy as np

from taming_jax.data.datasets import spread
from taming_jax.metrics.distances import Moments


class Collected(NamedTuple):
    """The moments of all features, and some of them [m,d], which are those of `rows` int [m]."""

    moments: Moments
    features: np.ndarray
    rows: np.ndarray

    def packed(self) -> dict[str, np.ndarray]:
        """As arrays that a file can hold."""
        return {
            "mu": np.asarray(self.moments.mean), "sigma": self.moments.covariance,
            "count": np.array(self.moments.count), "features": self.features, "rows": self.rows,
        }  # fmt: skip


def unpacked(arrays: dict[str, np.ndarray]) -> Collected:
    """From what `packed` answered."""
    count = int(arrays["count"])
    moments = Moments(count, arrays["mu"], arrays["sigma"] * (count - 1))
    return Collected(moments, arrays["features"], arrays["rows"])


class Collector:
    """Takes in the features of `count` images, in parts, and keeps at most `kept` of them, evenly
    spread."""

    def __init__(self, count: int, kept: int):
        self._rows, self._seen = spread(count, kept), 0
        self._moments = Moments()
        self._parts: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        self._moments.add(features)
        here = self._rows - self._seen
        self._parts.append(features[here[(here >= 0) & (here < len(features))]])
        self._seen += len(features)

    def collected(self) -> Collected:
        return Collected(self._moments, np.concatenate(self._parts), self._rows)
