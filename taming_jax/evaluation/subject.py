"""A run under a protocol: its data, the features, and what samples are held against."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.data import datasets
from taming_jax.data.augment import centred
from taming_jax.data.datasets import Split, spread
from taming_jax.errors import UserError
from taming_jax.files import read_arrays, text_hash, user_cache, write_arrays
from taming_jax.metrics import distances
from taming_jax.metrics.distances import Collected, Collector, Moments, unpacked
from taming_jax.metrics.features import Extractor, Features, digits, extractor_of, hash_of
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices
from taming_jax.progress import Progress
from taming_jax.run import Run

PART = 64  # images read at once, or as many more as the devices see at once
SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")  # the settings of `Run.sampling`


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a run is measured."""

    split: str = "test"
    """The split whose images are reconstructed, and whose features samples are held against."""
    images: int | None = None
    """How many of its images, evenly spread; all where None."""
    samples: int = 5000
    """How many are drawn, with classes as frequent as in the split; 0 skips samples."""
    features: str = "auto"
    """inception, vgg, classifier; auto takes InceptionV3 where its weights are, else VGG16."""
    weights: Path | None = None
    """InceptionV3's file, where it is not in the cache."""
    reference: Path | None = None
    """Moments of a reference, an .npz of mu and sigma, in place of the split's."""
    legacy_resize: bool = False
    """Bilinear without antialiasing, as the first FID."""
    kept: int = 10_000
    """The most features of a set that KD, precision, recall, density and coverage hold."""
    neighbours: int = 5
    seed: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | tuple[float, float] | None = None


def checked(protocol: Protocol) -> Protocol:
    """A protocol with its files as paths. UserError for numbers and splits that cannot be."""
    for name, least in (("samples", 2), ("images", 1), ("kept", 2), ("neighbours", 1)):
        value = getattr(protocol, name)
        if (name, value) == ("samples", 0):
            continue
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more.")
    if protocol.split not in ("train", "validation", "test"):
        raise UserError(f"there is no split '{protocol.split}'; take train, validation or test.")
    return dataclasses.replace(
        protocol, weights=protocol.weights and Path(protocol.weights),
        reference=protocol.reference and Path(protocol.reference),
    )  # fmt: skip


class Chosen:
    """Some images of a split, by their rows, as a model of images of so many pixels sees them."""

    def __init__(self, split: Split, rows: np.ndarray, size: int):
        self.split, self.rows, self.labels, self._size = split, rows, split.labels[rows], size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: Any) -> np.ndarray:
        images = self.split.images[self.rows[places]]
        return images if images.shape[1] == self._size else centred(images, self._size)

    @functools.cached_property
    def hash(self) -> str:
        """Of the images."""
        content = hashlib.sha256()
        for start in range(0, len(self), 1024):
            content.update(self[start : start + 1024].tobytes())
        return content.hexdigest()[:16]


class Evaluation:
    """A run under a protocol. What several settings of sampling share is computed once.

    `sweep` holds the guidance scales that samples are measured at beside the protocol's own.

    Raises UserError for a protocol that cannot be, for fewer than two images where samples are
    compared with them, for data that the run was not trained on and that was not named, and where
    the features, or the moments of a reference, cannot be had.
    """

    def __init__(
        self,
        run: Run,
        protocol: Protocol,
        devices: int | None = None,
        progress: bool = False,
        sweep: Sequence[float | tuple[float, float]] = (),
    ):
        protocol = checked(protocol)
        self.run, self.protocol, self.devices = run, protocol, Devices(devices)
        self.sweep: list[dict[str, Any]] = [{"guidance_scale": scale} for scale in sweep]
        self._count, self.progress = devices, progress
        if sweep and not protocol.samples:
            raise UserError("--sweep measures samples, and --samples 0 leaves them out; drop one.")
        if run.transformer is not None and protocol.samples:
            for changed in [{}, *self.sweep]:
                self.sampling(dataclasses.replace(protocol, **changed))
        data = run.config.data
        self.splits = distributed.agreed(run.load_data)
        self.identity = datasets.identity(self.splits)
        distributed.check_same_data(self.identity, datasets.unlike)
        classes = len(self.splits.class_names)
        self.prior_fits = run.transformer is not None and run.prior.classes == classes
        self.draws = run.transformer is not None and protocol.samples > 0
        if self.draws and not self.prior_fits:
            raise UserError(
                f"the data has {classes} classes and the prior of {run.workdir} has "
                f"{run.prior.classes}, so samples cannot follow the data's classes; skip them with "
                "--samples 0."
            )
        self.chosen = self.choice(protocol.split, protocol.images)
        self.warnings: list[str] = []
        if len(self.chosen) < 2:
            if self.draws:
                raise UserError(
                    f"{len(self.chosen)} image of the split '{protocol.split}' was chosen, and "
                    "distances of samples need two; take more, or skip samples with --samples 0."
                )
            self.warnings.append("No Fréchet distance: it needs two images.")
        if run.data_named and (sentence := run.other_data(self.splits)):
            self.warnings.append(sentence)

        def of_digits() -> Extractor:
            train = self.choice("train")
            return digits(Split(train[:], train.labels), len(self.splits.class_names))

        self.extractor = extractor_of(
            protocol.features, protocol.weights, protocol.legacy_resize, of_digits
        )
        self._reference: Moments | None = None
        if protocol.reference is not None:
            file, dimensions = protocol.reference, self.extractor.dimensions
            self._reference = distributed.agreed(lambda: distances.load_moments(file, dimensions))
        distributed.check_same_flags({
            "weights": self.extractor.weights, "reference": self.reference_hash
        })  # fmt: skip
        self.features = Features(self.extractor, self.devices)
        self.classifier = None
        if self.extractor.classes:
            self.classifier = self.features
        elif data.name == "mnist" and self.draws:
            self.classifier = Features(of_digits(), self.devices)

    def choice(self, split: str, most: int | None = None) -> Chosen:
        """The images of a split, or so many of them, evenly."""
        found: Split = getattr(self.splits, split)
        rows = spread(len(found.images), most or len(found.images))
        return Chosen(found, rows, self.run.config.data.image_size)

    def parts(self, chosen: Chosen, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Images in parts, with their places."""
        size = -(-PART // self.features.size) * self.features.size
        with Progress(name, len(chosen), "images", enabled=self.progress) as progress:
            for start in range(0, len(chosen), size):
                here = slice(start, min(start + size, len(chosen)))
                yield here, chosen[here]
                progress.update(here.stop - here.start)

    def phase(self, name: str) -> Progress:
        """Progress of work that is done in one piece."""
        return Progress(name, enabled=self.progress)

    def collected(self, chosen: Chosen, name: str) -> Collected:
        """The features of images: from the user's cache, or computed into it."""
        found = self.kept(chosen)
        if found is None:
            collector = Collector(len(chosen), self.protocol.kept)
            for _, images in self.parts(chosen, f"features of {name}"):
                collector.add(self.features(images)[0])
            found = self.keep(chosen, collector)
        return found

    def kept(self, chosen: Chosen) -> Collected | None:
        """The features of images from the user's cache, for all processes from the first one's."""
        arrays = distributed.from_first(lambda: read_arrays(self._file_of(chosen)))
        return None if arrays is None else unpacked(arrays)

    def keep(self, chosen: Chosen, collector: Collector) -> Collected:
        """What was collected of images, kept in the user's cache as well."""
        found = collector.collected()
        distributed.from_first(lambda: write_arrays(self._file_of(chosen), found.packed()))
        return found

    def _file_of(self, chosen: Chosen) -> Path:
        extractor = self.extractor
        name = [extractor.weights, extractor.resize, self.protocol.kept, chosen.hash]
        return user_cache() / "features" / f"{text_hash(name)[:32]}.npz"

    @property
    def reference_hash(self) -> str | None:
        """Of the file's moments, where there is one."""
        found = self._reference
        return None if found is None else hash_of((np.asarray(found.mean), found.covariance))

    @functools.cached_property
    def reference(self) -> Collected:
        """The features of the split's images."""
        return self.collected(self.chosen, self.protocol.split)

    @property
    def reference_moments(self) -> Moments:
        """What Fréchet distances are taken to: the file's, or the split's."""
        return self._reference or self.reference.moments

    def sampling(self, protocol: Protocol) -> dict[str, Any]:
        """How samples are drawn by a protocol, what it leaves open as the run's config has it.
        UserError where that cannot be."""
        given = {name: getattr(protocol, name) for name in SAMPLING}
        return self.run.sampling(**given, seed=protocol.seed)._asdict()

    def drawn(
        self, protocol: Protocol, labels: np.ndarray, numbers: np.ndarray
    ) -> Iterator[np.ndarray]:
        """New images, as a protocol samples."""
        return self.run.drawn(
            labels, numbers, **self.sampling(protocol), seed=protocol.seed, devices=self._count,
            batch_size=self.features.size, progress=self.progress,
        )  # fmt: skip
