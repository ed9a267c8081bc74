"""What a run is worth, as numbers, and against what exactly: reconstructions and samples."""

import contextlib
import dataclasses
import functools
import hashlib
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from taming_jax import losses
from taming_jax.data import sources
from taming_jax.data.augment import centred
from taming_jax.data.feeds import rounded, to_float
from taming_jax.data.sources import Split, spread
from taming_jax.errors import UserError
from taming_jax.evaluation import distances, similarity
from taming_jax.evaluation.collected import Collected, Collector, unpacked
from taming_jax.evaluation.distances import Moments
from taming_jax.evaluation.features import (
    VGG_SIZES,
    Extractor,
    Features,
    digits,
    extractor_of,
    fits_vgg,
    hash_of,
)
from taming_jax.figures import to_uint8
from taming_jax.files import read_arrays, text_hash, user_cache, write_arrays
from taming_jax.models.lpips import distance, load_lpips, vgg_features
from taming_jax.models.vqgan import decode_indices, encode, images_at_once
from taming_jax.train import hosts
from taming_jax.train.devices import Devices
from taming_jax.train.store import Store

if TYPE_CHECKING:
    from taming_jax.run import Run

SCHEMA = 1  # of the report
SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")
PART = 64  # images read at once, or as many more as the devices see at once


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a run is measured."""

    split: str = "test"
    """The split whose images are reconstructed, and whose features samples are held against."""
    images: int | None = None
    """How many of its images, evenly spread; all where None."""
    samples: int = 5000
    """How many are drawn, of the classes as often as the split has them."""
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
    for name, least in (("samples", 2), ("images", 2), ("kept", 2), ("neighbours", 1)):
        value = getattr(protocol, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more.")
    if protocol.split not in ("train", "validation", "test"):
        raise UserError(f"there is no split '{protocol.split}'; take train, validation or test.")
    return dataclasses.replace(
        protocol, weights=protocol.weights and Path(protocol.weights),
        reference=protocol.reference and Path(protocol.reference),
    )  # fmt: skip


class Evaluation:
    """A run under a protocol. What several settings of sampling share is computed once.

    `sweep` holds the guidance scales that samples are measured at beside the protocol's own.

    Raises UserError for a protocol that cannot be, a split that has fewer than two images, other
    data than the run was trained on, and where the features, or the moments of a reference, cannot
    be had.
    """

    def __init__(
        self,
        run: "Run",
        protocol: Protocol,
        devices: int | None = None,
        progress: bool = False,
        sweep: Sequence[float | tuple[float, float]] = (),
    ):
        protocol = checked(protocol)
        self.run, self.protocol, self.devices = run, protocol, Devices(devices)
        self.sweep: list[dict[str, Any]] = [{"guidance_scale": scale} for scale in sweep]
        self._count, self._quiet = devices, None if progress else True
        if run.transformer is not None:
            for changed in [{}, *self.sweep]:
                self.sampling(dataclasses.replace(protocol, **changed))
        data = run.config.data
        self.splits = hosts.agreed(lambda: sources.load(data))
        self._identity = sources.identity(self.splits)
        hosts.check_same_data(self._identity)
        others = sources.unlike(self._identity, run.dataset)
        if others:
            raise UserError(
                f"the run in {run.workdir} was trained on other data: {'; '.join(others)}."
            )
        self.split: Split = getattr(self.splits, protocol.split)
        available = len(self.split.images)
        self.rows = spread(available, protocol.images or available)
        if len(self.rows) < 2:
            raise UserError(
                f"the split '{protocol.split}' has {len(self.rows)} images; an evaluation needs 2."
            )
        self.labels = self.split.labels[self.rows]
        self.warnings: list[str] = []
        classes, train = len(self.splits.class_names), self.splits.train

        def of_digits() -> Extractor:
            images = self.images(train, np.arange(len(train.images)))
            return digits(Split(images, train.labels), classes)

        self.extractor = extractor_of(
            protocol.features, protocol.weights, protocol.legacy_resize, of_digits
        )
        self._reference: Moments | None = None
        if protocol.reference is not None:
            file, dimensions = protocol.reference, self.extractor.dimensions
            self._reference = hosts.agreed(lambda: distances.load_moments(file, dimensions))
        hosts.check_same_flags({
            "weights": self.extractor.weights, "reference": self._reference_hash
        })  # fmt: skip
        self.features = Features(self.extractor, self.devices)
        # Where LPIPS's VGG16 sees the images at the size that the features are of, it runs once.
        self._shared = self.extractor.name == "VGG16" and fits_vgg(data.image_size)
        self._classifier = None
        if self.extractor.classes:
            self._classifier = self.features
        elif data.name == "mnist" and run.transformer is not None:
            self._classifier = Features(of_digits(), self.devices)

    def images(self, split: Split, rows: np.ndarray) -> np.ndarray:
        """Images uint8 of a split, as the model sees them."""
        images = split.images[rows]
        size = self.run.config.data.image_size
        return images if images.shape[1] == size else centred(images, size)

    def parts(
        self, split: Split, rows: np.ndarray, name: str
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """A split's images in parts, with their places among the rows."""
        size = -(-PART // self.features.size) * self.features.size
        for start in tqdm(range(0, len(rows), size), desc=name, disable=self._quiet):
            here = slice(start, min(start + size, len(rows)))
            yield here, self.images(split, rows[here])

    def collected(self, split: Split, rows: np.ndarray, name: str) -> Collected:
        """The features of a split's images: from the user's cache, or computed into it."""
        file = self._file_of(split, rows)
        found = _kept(file)
        if found is None:
            collector = Collector(len(rows), self.protocol.kept)
            for _, images in self.parts(split, rows, f"features of {name}"):
                collector.add(self.features(images)[0])
            found = _keep(file, collector)
        return found

    def _file_of(self, split: Split, rows: np.ndarray) -> Path:
        extractor = self.extractor
        name = [extractor.weights, extractor.resize, self.protocol.kept, self.hash(split, rows)]
        return user_cache() / "features" / f"{text_hash(name)[:32]}.npz"

    def hash(self, split: Split, rows: np.ndarray) -> str:
        """Of a split's images."""
        content = hashlib.sha256()
        for start in range(0, len(rows), 1024):
            content.update(self.images(split, rows[start : start + 1024]).tobytes())
        return content.hexdigest()[:16]

    @functools.cached_property
    def _images_hash(self) -> str:
        return self.hash(self.split, self.rows)

    @property
    def _reference_hash(self) -> str | None:
        found = self._reference
        return None if found is None else hash_of((np.asarray(found.mean), found.covariance))

    @functools.cached_property
    def reference(self) -> Collected:
        """The features of the split's images."""
        return self.collected(self.split, self.rows, self.protocol.split)

    @property
    def reference_moments(self) -> Moments:
        """What Fréchet distances are taken to: the file's, or the split's."""
        return self._reference or self.reference.moments

    def _measured(self) -> Any:
        """The compiled pass over a batch of images uint8: their reconstructions uint8, indices,
        figures [b], and, where LPIPS's network gives them, the features of both."""
        size, model = self.run.config.data.image_size, self.run.model

        def measure(params: Any, images: jax.Array) -> Any:
            with jax.default_matmul_precision("highest"):
                real = to_float(images)
                indices = encode(model, params["generator"], real).indices
                decoded = decode_indices(model, params["generator"], indices)
                made = rounded(decoded)
                x, y = images / 255, made / 255
                found = {"l1": losses.l1(x, y), "psnr": similarity.psnr(x, y)}
                if size >= similarity.WINDOW:
                    found["ssim"] = similarity.ssim(x, y)
                features: list[jax.Array] = []
                if "lpips" in params:
                    maps = [
                        vgg_features(params["lpips"]["vgg"], each)
                        for each in (real, to_float(made))
                    ]
                    found["lpips"] = distance(params["lpips"]["heads"], *maps)
                    if self._shared:
                        features = [each[-1].mean((1, 2)) for each in maps]
            return made, indices, found, features

        return self.devices.compile(measure)

    def reconstruction(self) -> dict[str, Any]:
        """The figures of the split's reconstructions; `likelihood`, in bits a code, where there is
        a prior."""
        config, devices = self.run.config, self.devices
        params: dict[str, Any] = {"generator": jax.tree.map(np.asarray, self.run.params)}
        try:
            if config.data.image_size < VGG_SIZES[0]:
                raise UserError(f"its network sees {VGG_SIZES[0]} pixels and more.")
            params["lpips"] = load_lpips()
        except UserError as error:
            self.warnings.append(f"No LPIPS: {error}")
        params, measure = devices.replicate(params), self._measured()
        size = images_at_once(config, 32) * len(devices)
        sums: dict[str, float] = {}
        counts, bits = np.zeros(config.vqgan.codebook_size, np.int64), 0.0
        collector, real = Collector(len(self.rows), 0), None
        file = self._file_of(self.split, self.rows)
        if self._shared and "lpips" in params and _kept(file) is None:
            real = Collector(len(self.rows), self.protocol.kept)
        for here, images in self.parts(self.split, self.rows, "reconstructions"):
            codes_of_part, made_of_part = [], []
            for start in range(0, len(images), size):
                part = images[start : start + size]
                filled = np.minimum(np.arange(size), len(part) - 1)[devices.own(size)]
                answered = measure(params, devices.shard(part[filled]))
                gathered = jax.tree.map(devices.gather, answered)
                made, indices, found, features = jax.tree.map(
                    operator.itemgetter(slice(len(part))), gathered
                )
                for name, values in found.items():
                    sums[name] = sums.get(name, 0.0) + float(values.astype(np.float64).sum())
                counts += np.bincount(indices.ravel(), minlength=len(counts))
                if real is not None:
                    real.add(features[0])
                if features:
                    collector.add(features[1])
                made_of_part.append(made)
                codes_of_part.append(indices)
            if not features:
                collector.add(self.features(np.concatenate(made_of_part))[0])
            if self.run.transformer is not None:
                codes = np.concatenate(codes_of_part)
                bits -= float(self.run.code_likelihood(codes, self.labels[here]).sum() / np.log(2))
        if real is not None:  # LPIPS's network saw them
            _keep(file, real)
        n, shares = len(self.rows), counts[counts > 0] / counts.sum()
        length, pixels = counts.sum() / n, config.data.image_size**2
        entropy = float(-(shares * np.log2(shares)).sum())
        moments = collector.collected().moments
        report = {name: total / n for name, total in sums.items()} | {
            "fd": distances.frechet_distance(moments, self.reference_moments),
            "usage": float((counts > 0).mean()),
            "perplexity": 2**entropy,
            "bits_per_pixel": float(length * np.log2(len(counts)) / pixels),
            "entropy_bits_per_pixel": float(length * entropy / pixels),
            "code_counts": counts.tolist(),
        }
        if self.run.transformer is not None:
            report["likelihood_bits_per_code"] = bits / n / length
        return report

    def samples(self, **changed: Any) -> dict[str, Any]:
        """The figures of new images, by the protocol, or by what of its sampling is `changed`."""
        protocol = dataclasses.replace(self.protocol, **changed)
        reference = self.reference
        order = np.sort(self.labels, kind="stable")
        labels = order[_evenly(len(order), protocol.samples)].astype(np.int32)
        firsts = np.searchsorted(labels, labels)
        numbers = (np.arange(len(labels)) - firsts).astype(np.int32)
        collector = Collector(len(labels), protocol.kept)
        probabilities, right = [], np.zeros(len(labels), bool)
        done = 0
        for part in self._drawn(protocol, labels, numbers):
            images = to_uint8(part)
            features, classes = self.features(images)
            collector.add(features)
            if self.extractor.name == "InceptionV3":
                probabilities.append(classes)
            if self._classifier is not None:
                own = classes if self._classifier is self.features else self._classifier(images)[1]
                right[done : done + len(part)] = own.argmax(1) == labels[done : done + len(part)]
            done += len(part)
        found = collector.collected()
        fd = distances.frechet_distance(found.moments, self.reference_moments)
        report: dict[str, Any] = {"fd": fd} | self._compared(reference.features, found.features)
        if probabilities:
            score = distances.inception_score(np.concatenate(probabilities), seed=protocol.seed)
            report |= dict(
                zip(("inception_score", "inception_score_deviation"), score, strict=True)
            )
        if self._classifier is not None:
            report["accuracy"] = float(right.mean())
        report["per_class"] = self._per_class(labels, right, found)
        return report

    def _drawn(
        self, protocol: Protocol, labels: np.ndarray, numbers: np.ndarray
    ) -> Iterator[np.ndarray]:
        """New images, as a protocol samples."""
        return self.run.drawn(
            labels, numbers, **self.sampling(protocol), seed=protocol.seed, devices=self._count,
            batch_size=self.features.size, progress=self._quiet is None,
        )  # fmt: skip

    def sampling(self, protocol: Protocol) -> dict[str, Any]:
        """How samples are drawn by a protocol, what it leaves open as the run's config has it.
        UserError where that cannot be."""
        given = {name: getattr(protocol, name) for name in SAMPLING}
        return dict(zip(SAMPLING, self.run.sampling(**given, seed=protocol.seed), strict=True))

    def _compared(self, real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
        """What is taken from the features themselves, where there are enough of them."""
        protocol = self.protocol
        if min(len(real), len(fake)) <= protocol.neighbours:
            return {}
        kd, deviation = distances.kernel_distance(fake, real, protocol.seed)
        shares = distances.manifold(real, fake, protocol.neighbours)
        return {"kd": kd, "kd_deviation": deviation} | shares

    def _per_class(
        self, labels: np.ndarray, right: np.ndarray, found: Collected
    ) -> dict[str, dict[str, Any]]:
        """The same of each class that was drawn; `fd` where there are more images of it than
        features have dimensions."""
        reference, report = self.reference, {}
        for number in np.unique(labels):
            own: dict[str, Any] = {"samples": int((labels == number).sum())}
            if self._classifier is not None:
                own["accuracy"] = float(right[labels == number].mean())
            fake = found.features[labels[found.rows] == number]
            real = reference.features[self.labels[reference.rows] == number]
            if min(len(fake), len(real)) > self.extractor.dimensions:
                own["fd"] = distances.frechet_distance(
                    distances.moments(fake), distances.moments(real)
                )
            report[self.splits.class_names[number]] = own | self._compared(real, fake)
        return report

    def draw(self, folder: Path, report: dict[str, Any]) -> None:
        """The figures of a report: how often each code is used; of samples, the training images
        that are nearest to them; and of a sweep, its curves. Raises OSError."""
        from taming_jax import figures

        # All processes compute them, the first one writes.
        drawing = [
            functools.partial(
                figures.codebook_usage, np.array(report["reconstruction"]["code_counts"]),
                folder / "evaluation_codes.png", f"the {self.protocol.split} split",
            )
        ]  # fmt: skip
        if report["samples"] is not None:
            images, nearest, far = self.nearest(8)
            train, name = len(self.splits.train.images), self.extractor.name
            of = f"the nearest of {min(train, self.protocol.kept)} of {train} training images"
            drawing.append(
                functools.partial(
                    figures.nearest_images, images, nearest, far, f"{of}, by {name}'s features",
                    folder / "evaluation_nearest.png",
                )
            )  # fmt: skip
        if "sweep" in report:
            file = folder / "evaluation_sweep.png"
            drawing.append(
                functools.partial(figures.sweep, report["sweep"], report["features"], file)
            )
        for draw in drawing:
            hosts.from_first(draw)

    def nearest(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """So many samples uint8 [n,h,w,c], which of the training images (of at most `kept` of them)
        are nearest to them by their features, and how far these are, in units of what a training
        image is from its nearest."""
        rows = spread(len(self.splits.train.images), self.protocol.kept)
        known = self.collected(self.splits.train, rows, "training images")
        classes = spread(len(self.splits.class_names), count)
        labels = np.resize(np.sort(classes), count).astype(np.int32)
        numbers = (np.arange(count) // len(classes)).astype(np.int32)
        images = to_uint8(np.concatenate(list(self._drawn(self.protocol, labels, numbers))))
        found, squares = distances.nearest(self.features(images)[0], known.features)
        some = known.features[spread(len(rows), 1000)]
        apart = np.sqrt(np.median(distances.radii(known.features, 1, some)))
        nearest = self.images(self.splits.train, rows[known.rows[found]])
        return images, nearest, np.sqrt(squares) / apart

    def described(self) -> dict[str, Any]:
        """The protocol as the report has it: what was measured, against what, and how."""
        run, protocol, config = self.run, self.protocol, self.run.config
        has_prior, classifier = run.transformer is not None, self._classifier
        return {
            "run": str(run.workdir),
            "config": config.config,
            "vqgan_step": _stage1_step(run),
            "prior_step": run.step if has_prior else None,
            "generator": hash_of(jax.tree.map(np.asarray, run.params)),
            "dataset": config.data.name,
            "dataset_hash": text_hash(self._identity)[:16],
            "split": protocol.split,
            "images": len(self.rows),
            "images_hash": self._images_hash,
            "reference_file": None if protocol.reference is None else str(protocol.reference),
            "reference": self._reference_hash,
            "size": config.data.image_size,
            "crop": "squeezed" if config.data.squeeze else "centre",
            "features": self.extractor.name,
            "weights": self.extractor.weights,
            "resize": self.extractor.resize,
            "classifier": None if classifier is None else classifier.extractor.weights,
            "kept": protocol.kept,
            "neighbours": protocol.neighbours,
            "samples": protocol.samples if has_prior else 0,
            "classes": "as often as the split has them",
            "seed": protocol.seed,
            **(self.sampling(protocol) if has_prior else {}),
        }

    def warned(self) -> list[str]:
        """What has to be known beside the figures."""
        found, d = list(self.warnings), self.extractor.dimensions
        counts = {"images of the split": len(self.rows)}
        if self.run.transformer is not None:
            counts["samples"] = self.protocol.samples
        for name, count in counts.items():
            if count <= d:
                found.append(
                    f"{count} {name} are not more than the {d} dimensions of "
                    f"{self.extractor.name}: covariances are singular, and the Fréchet distance is "
                    "biased upwards."
                )
        return found


def _kept(file: Path) -> Collected | None:
    """Features from the user's cache, for all processes from the first one's."""
    arrays = hosts.from_first(lambda: read_arrays(file))
    return None if arrays is None else unpacked(arrays)


def _keep(file: Path, collector: Collector) -> Collected:
    """What was collected, kept in the user's cache as well."""
    found = collector.collected()
    hosts.from_first(lambda: write_arrays(file, found.packed()))
    return found


def _evenly(n: int, count: int) -> np.ndarray:
    """So many places of n things, evenly, each as often as the others."""
    return (np.arange(count) * n) // count


def _stage1_step(run: "Run") -> int | None:
    """The step of stage 1's best checkpoint, where that is the generator of this run."""
    if run.transformer is None:
        return run.step
    with contextlib.suppress(UserError):
        store = Store(run.workdir, "vqgan", "nll", read_only=True)
        (arrays, _, _), step = store.chosen()
        net = traverse_util.unflatten_dict(arrays)["nets"]["generator"]
        if hash_of(net.get("ema", net["params"])) == hash_of(jax.tree.map(np.asarray, run.params)):
            return step
    return None


def finished(evaluation: Evaluation) -> dict[str, Any]:
    """The whole report: `features`, `reconstruction`, `samples` (None without a prior), `protocol`,
    `warnings`, and under `sweep` the samples of each guidance scale."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "features": evaluation.extractor.distance,
        "reconstruction": evaluation.reconstruction(),
        "samples": None,
    }
    if evaluation.run.transformer is not None:
        report["samples"] = evaluation.samples()
        if evaluation.sweep:
            report["sweep"] = [
                changed | evaluation.samples(**changed) for changed in evaluation.sweep
            ]
    return report | {"protocol": evaluation.described(), "warnings": evaluation.warned()}
