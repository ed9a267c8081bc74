"""The inputs of an evaluation: the run, its data, and the feature extractors."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from taming_jax.data.augment import center_crop
from taming_jax.data.datasets import Split, evenly_spaced
from taming_jax.data.fingerprints import load_and_check
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.protocol import Protocol
from taming_jax.metrics import distances
from taming_jax.metrics.distances import FeatureStats, Moments
from taming_jax.metrics.features import Features, load_digit_classifier, load_pretrained
from taming_jax.metrics.monitor import number_within_classes
from taming_jax.parallel.devices import Devices
from taming_jax.progress import Progress
from taming_jax.run import Run
from taming_jax.sampler import Drawing

BATCH = 64  # images read at once, rounded up to a multiple of the feature batch


@dataclasses.dataclass(frozen=True)
class ImageSubset:
    """The images of a split at `rows` int [n], center-cropped to `size` pixels. Indexing returns
    images uint8 [b,size,size,c]."""

    split: Split
    rows: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return center_crop(self.split.images[self.rows[index]], self.size)

    @property
    def labels(self) -> np.ndarray:
        """The classes, int32 [n]."""
        return self.split.labels[self.rows]

    def hash(self) -> str:
        """Returns the first 16 hexadecimal digits of a SHA-256 hash of the images."""
        content = hashlib.sha256()
        for start in range(0, len(self), 1024):
            content.update(self[start : start + 1024].tobytes())
        return content.hexdigest()[:16]


class Evaluator:
    """A run, and the data and feature extractors to evaluate it with.

    Raises UserError if a sampling setting is invalid, if samples cannot be compared with the data
    (it has other classes, or fewer than two images are selected), if the run was not trained on the
    data and you did not set `data.name`, or if features or reference moments are not available.
    """

    def __init__(
        self, run: Run, protocol: Protocol, devices: int | None = None, progress: bool = False
    ):
        self.run, self.protocol, self.progress = run, protocol, progress
        self.devices = Devices(devices)
        self.has_samples = run.transformer is not None and protocol.samples > 0
        self.warnings: list[str] = []
        if self.has_samples:
            run.sampler.resolve_settings(
                **protocol.sampling
            )  # raises UserError before the data is loaded
        self.splits, self.fingerprint = load_and_check(run.load_data)
        classes = len(self.splits.class_names)
        self.prior_fits = run.transformer is not None and run.prior.classes == classes
        self.images = self.select_images(protocol.split, protocol.images)
        self._check_data()
        if protocol.features == "classifier":
            self.features = self._load_digit_classifier()
            self.classifier: Features | None = self.features
        else:
            extractor = load_pretrained(protocol.features, protocol.weights, protocol.legacy_resize)
            self.features = Features(extractor, self.devices)
            has_digits = self.has_samples and run.config.data.name == "mnist"
            self.classifier = self._load_digit_classifier() if has_digits else None
        self.extractor = self.features.extractor
        self.file_moments: Moments | None = None
        if protocol.reference is not None:
            file, dimensions = Path(protocol.reference), self.extractor.dimensions
            self.file_moments = distances.load_moments(file, dimensions)

    def _check_data(self) -> None:
        run, classes = self.run, len(self.splits.class_names)
        if self.has_samples and not self.prior_fits:
            raise UserError(
                f"the data has {classes} classes and the prior of {run.workdir} has "
                f"{run.prior.classes}, so samples cannot have the classes of the data; skip "
                "samples with --samples 0."
            )
        if self.has_samples and len(self.images) < 2:
            raise UserError(
                f"{len(self.images)} image of the split '{self.protocol.split}' is selected, but "
                "metrics of samples need two; increase --images, or skip samples with --samples 0."
            )
        if len(self.images) < 2:
            self.warnings.append("No Fréchet distance: it needs two images.")
        if run.data_named and (warning := run.describe_data_mismatch(self.splits)):
            self.warnings.append(warning)

    def _load_digit_classifier(self) -> Features:
        images, labels = self.splits.train
        train = Split(center_crop(images, self.run.config.data.image_size), labels)
        return Features(load_digit_classifier(train, len(self.splits.class_names)), self.devices)

    def select_images(self, name: str, limit: int | None = None) -> ImageSubset:
        """Returns the images of the split `name`, or at most `limit` of them, evenly spaced."""
        split: Split = getattr(self.splits, name)
        rows = evenly_spaced(len(split.images), limit or len(split.images))
        return ImageSubset(split, rows, self.run.config.data.image_size)

    def read_batches(self, images: ImageSubset, label: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields the rows and the images of each batch. `label` appears in the progress bar."""
        size = math.ceil(BATCH / self.features.batch_size) * self.features.batch_size
        with Progress(label, len(images), "images", enabled=self.progress) as progress:
            for start in range(0, len(images), size):
                rows = slice(start, start + size)
                yield rows, images[rows]
                progress.update(size)

    def compute_feature_stats(self, images: ImageSubset, name: str) -> FeatureStats:
        """Computes the features of images. `name` describes them in the progress bar."""
        stats = FeatureStats(len(images), self.protocol.kept)
        for _, batch in self.read_batches(images, f"features of {name}"):
            stats.add(self.features(batch)[0])
        return stats

    @functools.cached_property
    def reference(self) -> FeatureStats:
        """The feature statistics of the split's selected images."""
        return self.compute_feature_stats(self.images, self.protocol.split)

    @property
    def reference_moments(self) -> Moments:
        """The moments for Fréchet distances: those of the reference file or the split."""
        return self.file_moments or self.reference.moments

    def draw_samples(self, labels: np.ndarray) -> Iterator[np.ndarray]:
        """Yields batches of samples uint8 [b,h,w,c] of the classes `labels` int32 [n]."""
        batches = self.run.sampler.draw(
            Drawing(labels, number_within_classes(labels)), **self.protocol.sampling,
            devices=len(self.devices.list), batch_size=self.features.batch_size,
            progress=self.progress,
        )  # fmt: skip
        return map(to_uint8, batches)
