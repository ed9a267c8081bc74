"""A run under a protocol: its data, the features, and what samples are compared with."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from taming_jax.data import datasets
from taming_jax.data.augment import centred
from taming_jax.data.datasets import Split, spread
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.protocol import Protocol
from taming_jax.metrics import distances
from taming_jax.metrics.distances import FeatureStats, Moments
from taming_jax.metrics.features import Features, digits, pretrained
from taming_jax.metrics.monitor import ranks
from taming_jax.parallel.devices import Devices
from taming_jax.progress import Progress
from taming_jax.run import Run

PART = 64  # images read at once, or as many more as the devices see at once


@dataclasses.dataclass(frozen=True)
class ImageSubset:
    """The images of a split at `rows` int [n], cropped at the centre to `size` pixels. They are
    read when they are indexed: uint8 [b,size,size,c]."""

    split: Split
    rows: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        return centred(self.split.images[self.rows[places]], self.size)

    @property
    def labels(self) -> np.ndarray:
        """The classes, int32 [n]."""
        return self.split.labels[self.rows]

    def hash(self) -> str:
        """The first 16 digits of a hash of the images."""
        content = hashlib.sha256()
        for start in range(0, len(self), 1024):
            content.update(self[start : start + 1024].tobytes())
        return content.hexdigest()[:16]


class Evaluator:
    """Measures a run under a protocol.

    Raises UserError for settings of sampling that are not possible, for fewer than two images where
    samples are compared with them, for data that the run was not trained on and that was not named,
    and where the features, or the moments of a reference, cannot be had.
    """

    def __init__(
        self, run: Run, protocol: Protocol, devices: int | None = None, progress: bool = False
    ):
        self.run, self.protocol, self.progress = run, protocol, progress
        self.devices = Devices(devices)
        self.draws = run.transformer is not None and protocol.samples > 0
        self.warnings: list[str] = []
        if self.draws:
            run.sampling(**protocol.sampling)
        self.splits, self.identity = datasets.load_same(run.load_data)
        classes = len(self.splits.class_names)
        self.prior_fits = run.transformer is not None and run.prior.classes == classes
        self.chosen = self.subset(protocol.split, protocol.images)
        self._check_data()
        if protocol.features == "classifier":
            self.features = self._digit_classifier()
            self.classifier: Features | None = self.features
        else:
            extractor = pretrained(protocol.features, protocol.weights, protocol.legacy_resize)
            self.features = Features(extractor, self.devices)
            reads_digits = self.draws and run.config.data.name == "mnist"
            self.classifier = self._digit_classifier() if reads_digits else None
        self.extractor = self.features.extractor
        self.file_moments: Moments | None = None
        if protocol.reference is not None:
            file, dimensions = Path(protocol.reference), self.extractor.dimensions
            self.file_moments = distances.load_moments(file, dimensions)

    def _check_data(self) -> None:
        run, classes = self.run, len(self.splits.class_names)
        if self.draws and not self.prior_fits:
            raise UserError(
                f"the data has {classes} classes and the prior of {run.workdir} has "
                f"{run.prior.classes}, so samples cannot follow the data's classes; skip them with "
                "--samples 0."
            )
        if self.draws and len(self.chosen) < 2:
            raise UserError(
                f"{len(self.chosen)} image of the split '{self.protocol.split}' was chosen, and "
                "distances of samples need two; take more, or skip samples with --samples 0."
            )
        if len(self.chosen) < 2:
            self.warnings.append("No Fréchet distance: it needs two images.")
        if run.data_named and (sentence := run.other_data(self.splits)):
            self.warnings.append(sentence)

    def _digit_classifier(self) -> Features:
        images, labels = self.splits.train
        train = Split(centred(images, self.run.config.data.image_size), labels)
        return Features(digits(train, len(self.splits.class_names)), self.devices)

    def subset(self, split: str, most: int | None = None) -> ImageSubset:
        """The images of a split, or `most` of them, evenly spread."""
        chosen: Split = getattr(self.splits, split)
        rows = spread(len(chosen.images), most or len(chosen.images))
        return ImageSubset(chosen, rows, self.run.config.data.image_size)

    def parts(self, images: ImageSubset, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Images in parts, each with its place among them. `name` is what progress is called."""
        size = math.ceil(PART / self.features.size) * self.features.size
        with Progress(name, len(images), "images", enabled=self.progress) as progress:
            for start in range(0, len(images), size):
                place = slice(start, start + size)
                yield place, images[place]
                progress.update(size)

    def feature_stats(self, images: ImageSubset, name: str) -> FeatureStats:
        """The features of images. `name` says which ones, for progress."""
        stats = FeatureStats(len(images), self.protocol.kept)
        for _, part in self.parts(images, f"features of {name}"):
            stats.add(self.features(part)[0])
        return stats

    @functools.cached_property
    def reference(self) -> FeatureStats:
        """The features of the split's images."""
        return self.feature_stats(self.chosen, self.protocol.split)

    @property
    def reference_moments(self) -> Moments:
        """What Fréchet distances are taken to: the moments in the file, or the split's."""
        return self.file_moments or self.reference.moments

    def drawn(self, labels: np.ndarray) -> Iterator[np.ndarray]:
        """Yields batches of new images uint8 [b,h,w,c] of classes int32 [n]; see `Run.drawn`."""
        parts = self.run.drawn(
            labels, ranks(labels), **self.protocol.sampling, devices=len(self.devices.list),
            batch_size=self.features.size, progress=self.progress,
        )  # fmt: skip
        return map(to_uint8, parts)
