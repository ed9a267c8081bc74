"""A finished (or half-finished) run as an object, for notebooks."""

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax import tiles
from taming_jax.config.load import differences, override, read_config, replaced
from taming_jax.config.schema import Config
from taming_jax.config.validation import flag
from taming_jax.data import datasets
from taming_jax.data.datasets import Split, Splits
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError, say
from taming_jax.models.vqgan import build_vqgan, decode_indices, encode, images_at_once
from taming_jax.parallel.devices import Devices, in_batches
from taming_jax.parallel.runtime import keep_programs
from taming_jax.priors.registry import Prior, build_prior
from taming_jax.sampler import Sampler, Settings, kept_codes
from taming_jax.training.checkpoints import Store
from taming_jax.training.tokens import Tokenizer

# Images a call of the compiled functions, which are compiled for these two sizes; the last batch is
# filled up.
FEW, BATCH = 8, 64


def load_run(workdir: str | Path, data: Mapping[str, Any] | None = None) -> "Run":
    """The best checkpoints of the run in a folder (the newest where none was validated): the prior,
    where there is one, with the generator whose codes it speaks, else stage 1's.

    `data` names settings of the dataset, such as `{"path": "elsewhere/birds"}`, where they are not
    those of the run's config.json: for data that has moved, or other data.

    Raises UserError where the folder holds no run, or none of its checkpoints can be read.
    """
    folder = Path(workdir)
    run = Run(folder, *_read(folder))
    return run.with_data(data) if data else run


def _read(folder: Path) -> tuple[Config, int, dict[str, Any] | None, Any, Any]:
    """What a run is made of, from its folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a run's, such as runs/mnist_tiny.")
    prior = Store(folder, "prior")
    if prior.steps():
        checkpoint = prior.chosen()
        transformer = checkpoint.nets["transformer"]["params"]
    else:
        checkpoint, transformer = Store(folder, "vqgan").chosen(), None
    config = _with_current_data(checkpoint.config, folder)
    return config, checkpoint.step, checkpoint.dataset, checkpoint.generator, transformer


def _with_current_data(config: Config, folder: Path) -> Config:
    """A checkpoint's config with the data settings of the run's config.json, which may name another
    place since, or the dataset of an imported run; as it is where those are of other data."""
    with contextlib.suppress(UserError):
        current = read_config(folder / "config.json")
        if not differences(current, config, ("data",)):
            return dataclasses.replace(config, data=current.data)
    return config


class Run:
    """A run's config, generator (its moving average where it keeps one) and prior, if it has one.

    Images are uint8 [n,h,w,c], or float [n,h,w,c] in [-1, 1], and are returned in the same form.
    Products are computed at the highest precision the device has.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        step: int,
        dataset: dict[str, Any] | None,
        generator: Any,
        transformer: Any = None,
    ):
        self.workdir, self.config, self.step, self.dataset = workdir, config, step, dataset
        self.data_named = False  # whether `with_data` named the dataset
        if config.compile_cache:
            keep_programs()
        self.params = jax.device_put(generator)
        # Codes are always computed in float32, as those the prior learned from were.
        self.model = build_vqgan(dataclasses.replace(config, dtype="float32"))
        self._encode = jax.jit(lambda params, images: encode(self.model, params, images).indices)
        self._decode = jax.jit(functools.partial(decode_indices, self.model))
        self.transformer = None if transformer is None else jax.device_put(transformer)

    def __repr__(self) -> str:
        stage = "stage 1" if self.transformer is None else "both stages"
        return f"Run({str(self.workdir)!r}, {self.config.config}, {stage}, step {self.step})"

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        if self.dataset is None:
            return datasets.load(self.config.data).class_names
        return tuple(self.dataset["class_names"])

    def with_data(self, settings: Mapping[str, Any]) -> "Run":
        """This run with other settings of its dataset, those of `DataConfig`: `path` says where
        the data is now, `name` that this data is meant, whatever the run was trained on.

        Raises UserError for settings that do not exist, or do not fit the run's networks.
        """
        given = {k: os.fspath(x) if isinstance(x, os.PathLike) else x for k, x in settings.items()}
        config = self.config
        if given.get("name", config.data.name) != config.data.name:
            # Where the old data is, and what its columns are called, is not the new one's matter.
            config = replaced(config, "data", path=None, image_column=None, label_column=None)
        other = copy.copy(self)
        other.config = override(config, {f"data.{name}": value for name, value in given.items()})
        for name in ("image_size", "channels"):
            own, new = getattr(self.config.data, name), getattr(other.config.data, name)
            if own != new:
                raise UserError(
                    f"{flag('data', name)} is {new}, but this run's networks take {own}."
                )
        other.data_named = "name" in given
        other.__dict__.pop("class_names", None)
        return other

    def load_data(self) -> Splits:
        """The run's dataset. Where `with_data` named it, says whether it is what the run was
        trained on, as far as counts, classes and means of some images tell.

        Raises UserError where the dataset cannot be read, and where it is not what the run was
        trained on and was not named.
        """
        splits = datasets.load(self.config.data)
        others = datasets.unlike(datasets.identity(splits), self.dataset)
        if others and not self.data_named:
            raise UserError(
                f"the run in {self.workdir} was trained on other data: {'; '.join(others)}. Give "
                "the folder of the original data by --data.path; to use this data instead, add "
                f"--data.name {self.config.data.name}."
            )
        if self.data_named:
            say(self.other_data(splits) or "The data is what the run was trained on.")
        return splits

    def other_data(self, splits: Splits) -> str:
        """A sentence where a dataset is not known to be what the run was trained on; else
        nothing."""
        if self.dataset is None or "images" not in self.dataset:
            return "It is not known whether the run was trained on this data."
        others = datasets.unlike(datasets.identity(splits), self.dataset)
        return f"The run was trained on other data: {'; '.join(others)}." if others else ""

    def labels(self, classes: int | str | Iterable[int | str]) -> np.ndarray:
        """Classes by number or by name as numbers, int32 [n]. UserError for others."""
        return datasets.class_numbers(classes, self.class_names)

    @functools.cached_property
    def prior(self) -> Prior:
        """The prior's module. UserError where the run has none."""
        if self.transformer is None:
            raise UserError(f"{self.workdir} has no prior yet; train one with train_prior.py.")
        return build_prior(self.config, len(self.class_names))

    @functools.cached_property
    def _sampler(self) -> Sampler:
        params = {"transformer": self.transformer, "generator": self.params}
        return Sampler(self.config, self.prior, self.model, params, self.decode)

    @functools.cached_property
    def _likelihood(self) -> Callable[..., jax.Array]:
        return jax.jit(self.prior.log_likelihood)

    def sample(
        self,
        classes: int | str | Iterable[int | str],
        per_class: int = 1,
        *,
        prefix: Any = None,
        **settings: Any,
    ) -> np.ndarray:
        """New images of classes (numbers or names), float32 [n,h,w,c] in [-1, 1]: `per_class` of
        the first, then of the second, and so on.

        Image i of a class depends on the seed, the class and i alone: images are drawn in
        micro-batches whose size is fixed for a kind of device (8 on a CPU, 32 on others; another
        kind rounds otherwise, and may draw other codes). `prefix` int [p] holds the first codes, in
        raster order. `settings`, all with defaults, are

        - `temperature`: 0 takes the most likely codes; `top_k` and `top_p` leave unlikely ones out;
          a `guidance_scale` above 1 exaggerates what is particular to the class, and two of them
          are the first code's and the last's, with the codes between on a line. What is None is as
          the run's config has it (a guidance scale or top-p of 1 does nothing).
        - `size`: height and width in pixels, where they are larger than the training images': codes
          are then drawn in windows as large as those.
        - `seed`; `devices`, all unless told; `batch_size`, which bounds how many images are in
          flight, in whole micro-batches; `progress`, a bar.
        """
        each, known = self.labels(classes), None
        if per_class < 1 or not len(each):
            raise UserError(f"nothing is to be drawn: {per_class} images of {len(each)} classes.")
        labels = np.repeat(each, per_class)
        numbers = np.tile(np.arange(per_class, dtype=np.int32), len(each))
        if prefix is not None:
            codes = np.asarray(prefix)
            if codes.ndim != 1 or (codes < 0).any():
                raise UserError("a prefix is one row of codes, from 0.")
            known = np.broadcast_to(codes, (len(labels), len(codes)))
        return np.concatenate(list(self.drawn(labels, numbers, known=known, **settings)))

    def complete(
        self,
        images: Any,
        classes: int | str | Iterable[int | str] | None = None,
        per_image: int = 1,
        *,
        keep: float = 0.5,
        mask: Any = None,
        **settings: Any,
    ) -> np.ndarray:
        """Images [n,h,w,c], of the training size or larger, with what of their codes is not kept
        drawn anew, `per_image` of the first, then of the second, and so on: float32 [.,h,w,c] in
        [-1, 1].

        Kept is a share of the rows from the top, or where a bool `mask` [h',w'] of codes, or
        [h,w] of pixels, is true. Codes are drawn in raster order: a code knows what is above it,
        and to its left, kept or not, and nothing of what is kept below. `classes` is one of all
        images, or one of each; where it is None, none, which needs a prior trained with
        --prior.label-dropout, or one that knows one class only. `settings` are those of `sample`.
        """
        images = np.asarray(images)
        codes = self.encode(images)
        n, *grid = codes.shape
        labels = self._labels_of(classes, n)
        known = np.where(kept_codes(keep, mask, (grid[0], grid[1]), self.factor), codes, -1)
        if per_image < 1:
            raise UserError(f"nothing is to be drawn: {per_image} completions per image.")
        return np.concatenate(list(self.drawn(
            np.repeat(labels, per_image), np.tile(np.arange(per_image, dtype=np.int32), n),
            known=np.repeat(known.reshape(n, -1), per_image, 0),
            size=(images.shape[1], images.shape[2]), **settings,
        )))  # fmt: skip

    def _labels_of(self, classes: int | str | Iterable[int | str] | None, n: int) -> np.ndarray:
        """The classes of n images, int32 [n]: one of all, or one of each, or none of any."""
        if classes is None:
            none = 0 if self.prior.classes == 1 else self.prior.classes
            if none and not self.config.prior.label_dropout:
                raise UserError(
                    "this prior does not know images of no class (it was trained without "
                    "--prior.label-dropout); name theirs."
                )
            return np.full(n, none, np.int32)
        labels = self.labels(classes)
        if len(labels) not in (1, n):
            raise UserError(f"{n} images and {len(labels)} classes were given.")
        return np.broadcast_to(labels, n)

    def drawn(
        self, labels: np.ndarray, numbers: np.ndarray, **settings: Any
    ) -> Iterator[np.ndarray]:
        """The images of `sample`, in parts: image `numbers[i]`, int32 [n], of class `labels[i]`,
        int32 [n]; `settings` are those of `sample`, and `known` int [n,t], codes that are not to be
        drawn, with -1 where they are."""
        return self._sampler.drawn(labels, numbers, **settings)

    def sampling(self, **settings: Any) -> Settings:
        """The settings of `sample`, what is None as the run's config has it. UserError where they
        cannot be."""
        return self._sampler.settings(**settings)

    def log_likelihood(self, images: Any, labels: Any) -> np.ndarray:
        """Returns the log-likelihood, in nats, of the codes of images [n,h,w,c] given their classes
        (numbers or names; one for all images, or one per image): float32 [n]."""
        return self.code_likelihood(self.encode(images), self._labels_of(labels, len(images)))

    def code_likelihood(self, indices: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The same of code indices int32 [n,h',w'] and classes int32 [n]."""
        given, known = indices.shape[1:], self.prior.window
        if given != known:
            raise UserError(f"the prior computes likelihoods of {known} codes, not of {given}.")
        return self._batched(self._likelihood, (numbers, indices), 1, self.transformer)

    def tokens(self, split: str = "train") -> Split:
        """A split of the run's dataset as codes, unsigned [n, h' * w'], not augmented, with its
        labels: read from the run's folder, or encoded into it."""
        if split not in ("train", "validation", "test"):
            raise UserError(f"there is no split '{split}'; take train, validation or test.")
        splits = self.load_data()
        params = jax.tree.map(np.asarray, self.params)
        folder = self.workdir / "tokens"
        tokenizer = Tokenizer(folder, self.model, params, self.config, Devices(1))
        return tokenizer(split, getattr(splits, split))

    @property
    def factor(self) -> int:
        """How many pixels a code is high and wide."""
        return self.config.downsample_factor

    def encode(self, images: Any, tile: int | None = None) -> np.ndarray:
        """Images [n,h,w,c] to code indices, int32 [n,h',w']. Height and width are multiples of
        `factor`; images of more than a million pixels, or where `tile` is told, are taken in tiles
        of so many pixels a side that overlap. UserError for other shapes and types."""
        images, factor = np.asarray(images), self.factor
        channels = self.config.data.channels
        if (
            images.ndim != 4 or images.shape[3] != channels
            or any(size < factor or size % factor for size in images.shape[1:3])
        ):  # fmt: skip
            raise UserError(
                f"images of shape {images.shape} were given; this run takes [n, h, w, {channels}], "
                f"h and w multiples of {factor} (it was trained on {self.config.data.image_size})."
            )
        if images.dtype == np.uint8:
            images = to_float(images)
        elif not np.issubdtype(images.dtype, np.floating):
            raise UserError(
                f"images of type {images.dtype} were given; this run takes uint8, or floats in "
                "[-1, 1]."
            )
        elif not np.abs(images).max(initial=0) <= 1.001:
            raise UserError(
                "images of type float must lie in [-1, 1]; others, or NaN, were given. Pass uint8, "
                "or images / 127.5 - 1."
            )

        def encode(images: np.ndarray) -> np.ndarray:
            pixels = images.shape[1] * images.shape[2]
            return self._batched(self._encode, (images,), pixels, self.params)

        return tiles.encoded(encode, images.astype(np.float32), factor, tile)

    def decode(self, indices: Any, tile: int | None = None) -> np.ndarray:
        """Code indices int [n,h',w'], a grid of any size, to images float32 [n,h,w,c] in [-1, 1];
        in tiles as `encode`. UserError for other types and codes that do not exist."""
        indices, codes = np.asarray(indices), self.config.vqgan.codebook_size
        if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
            raise UserError(
                f"indices of shape {indices.shape} and type {indices.dtype} were given; this run "
                "takes integers [n, h', w']."
            )
        if not indices.size:
            raise UserError("no codes were given.")
        if indices.min() < 0 or indices.max() >= codes:
            raise UserError(f"indices go from 0 to {codes - 1}; others were given.")

        def decode(indices: np.ndarray) -> np.ndarray:
            pixels = indices[0].size * self.factor**2
            return self._batched(self._decode, (indices,), pixels, self.params)

        channels = self.config.data.channels
        return tiles.decoded(decode, indices.astype(np.int32), self.factor, channels, tile)

    def reconstruct(self, images: Any) -> np.ndarray:
        """Images through the codes and back, uint8 as uint8 and floats as float32. UserError as
        `encode`."""
        images = np.asarray(images)
        reconstruction = self.decode(self.encode(images))
        return to_uint8(reconstruction) if images.dtype == np.uint8 else reconstruction

    @staticmethod
    def _batched(
        function: Callable[..., jax.Array], arrays: tuple[np.ndarray, ...], pixels: int, params: Any
    ) -> np.ndarray:
        """Applies a compiled function to parameters and arrays [n, ...] in batches of one size, so
        that it is compiled once for images of so many pixels."""
        n, most = len(arrays[0]), images_at_once(pixels, BATCH)
        if not n:
            raise UserError("nothing was given: the first dimension is 0.")
        size = most if n > FEW else min(FEW, most)
        with jax.default_matmul_precision("highest"):
            return in_batches(lambda rows: function(params, *rows), arrays, size)
