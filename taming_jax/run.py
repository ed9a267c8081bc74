"""The Python interface to a finished or unfinished run, for example for notebooks."""

import copy
import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax import hub, tiled_inference
from taming_jax.config.load import override, replace_section, update_data_settings
from taming_jax.config.schema import Config
from taming_jax.config.validation import format_flag
from taming_jax.data import datasets
from taming_jax.data.datasets import Split, Splits
from taming_jax.data.fingerprints import compute_fingerprint, diff_fingerprints
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError, say
from taming_jax.models.vqgan import build_vqgan, decode_indices, encode, max_batch
from taming_jax.parallel.devices import Devices, map_batches
from taming_jax.parallel.runtime import enable_compile_cache
from taming_jax.pretrained import FILES, is_pretrained, read_pretrained
from taming_jax.priors.registry import Prior, build_prior
from taming_jax.sampler import Classes, Sampler
from taming_jax.storage import expand_user
from taming_jax.training.checkpoints import Store
from taming_jax.training.tokens import Tokenizer
from taming_jax.weights.arrays import hash_arrays

# The two batch sizes that the networks are compiled for; the last batch is padded.
SMALL_BATCH, BATCH = 8, 64


def load_run(workdir: str | Path, data: Mapping[str, Any] | None = None) -> "Run":
    """Loads a run from the best checkpoint in its folder, or from the newest if none was validated.
    If the run has a prior, loads the prior and the generator that it was trained on, else stage 1.

    Also loads the folders that `save_pretrained` writes, and, as `hf://user/name` or
    `hf://user/name@revision`, those on the Hugging Face hub, which it downloads.

    `data` overrides data settings of the run's config.json, such as `{"path": "elsewhere/birds"}`
    for data that has moved; see `Run.with_data`.

    Raises UserError if the folder or repository does not exist or holds no run, or if none of its
    checkpoints can be read.
    """
    if str(workdir).startswith(hub.PREFIX):
        folder = hub.download(str(workdir), FILES)
    else:
        folder = expand_user(workdir)
    run = Run(folder, *_load_checkpoint(folder))
    return run.with_data(data) if data else run


def _load_checkpoint(folder: Path) -> tuple[Config, int, dict[str, Any] | None, Any, Any]:
    """Returns the arguments of `Run`, except `workdir`, from a folder's checkpoint."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; name the folder of a run, such as runs/mnist_tiny."
        )
    if is_pretrained(folder):
        content = read_pretrained(folder)
        networks = content.networks
        return *content[:3], networks["generator"], networks.get("transformer")
    prior_store = Store(folder, "prior")
    if prior_store.steps():
        checkpoint = prior_store.load_best()
        transformer = checkpoint.nets["transformer"]["params"]
    else:
        checkpoint, transformer = Store(folder, "vqgan").load_best(), None
    config = update_data_settings(checkpoint.config, folder)
    return config, checkpoint.step, checkpoint.dataset, checkpoint.generator, transformer


def hash_run(workdir: Path) -> str:
    """Returns the hash of the weights that `load_run` loads; see `Run.hash_weights`. Does not start
    JAX."""
    _, _, _, generator, transformer = _load_checkpoint(workdir)
    return hash_arrays((generator, transformer))


class Run:
    """A run's config, generator (its EMA if the run keeps one) and prior, if it has one.

    Images are uint8 [n,h,w,c], or float [n,h,w,c] in [-1, 1]. `model` is the generator in the run's
    dtype, which decodes. `float32_model` is the same network in float32, which encodes.
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
        self.data_named = False  # whether `with_data` set the dataset's name
        if config.compile_cache:
            enable_compile_cache()
        self.params = jax.device_put(generator)
        # Codes are always computed in float32, like those that the prior was trained on.
        self.float32_model = build_vqgan(dataclasses.replace(config, dtype="float32"))
        self.model = build_vqgan(config)
        self._encode = jax.jit(
            lambda params, images: encode(self.float32_model, params, images).indices
        )
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

    @property
    def trained_classes(self) -> list[int]:
        """The numbers of the classes with training images, as far as that is known."""
        untrained = (self.dataset or {}).get("untrained_classes", [])
        return [i for i in range(len(self.class_names)) if i not in untrained]

    def hash_weights(self) -> str:
        """Returns a hash of the weights of both stages, 16 hexadecimal digits."""
        return hash_arrays((self.params, self.transformer))

    def with_data(self, settings: Mapping[str, Any]) -> "Run":
        """Returns this run with other data settings (fields of `DataConfig`): `path` is the current
        location of the data, and `name` selects a dataset, which need not be the one that the run
        was trained on.

        Raises UserError if a setting does not exist, or does not fit the run's networks.
        """
        values = {k: os.fspath(x) if isinstance(x, os.PathLike) else x for k, x in settings.items()}
        config = self.config
        if values.get("name", config.data.name) != config.data.name:
            # How the files of the old dataset are read does not apply to the new one.
            config = replace_section(
                config, "data", path=None, layout="auto", config=None, image_column=None,
                label_column=None,
            )  # fmt: skip
        other = copy.copy(self)
        other.config = override(config, {f"data.{name}": value for name, value in values.items()})
        for name in ("image_size", "channels"):
            old, new = getattr(self.config.data, name), getattr(other.config.data, name)
            if old != new:
                raise UserError(
                    f"{format_flag('data', name)} is {new}, but this run's networks take {old}."
                )
        other.data_named = "name" in values
        other.__dict__.pop("class_names", None)
        return other

    def load_data(self) -> Splits:
        """Loads the run's dataset. If `with_data` set its name, also prints whether the run was
        trained on it, judging by counts, classes and means of some images.

        Raises UserError if the dataset cannot be read, or if it is not the dataset that the run was
        trained on and `with_data` did not set its name.
        """
        splits = datasets.load(self.config.data)
        changes = diff_fingerprints(compute_fingerprint(splits), self.dataset)
        if changes and not self.data_named:
            raise UserError(
                f"the run in {self.workdir} was trained on other data: {'; '.join(changes)}. Pass "
                "the folder of the original data with --data.path; to use this data instead, add "
                f"--data.name {self.config.data.name}."
            )
        if self.data_named:
            say(self.describe_data_mismatch(splits) or "The run was trained on this data.")
        return splits

    def describe_data_mismatch(self, splits: Splits) -> str:
        """Returns a sentence if the run was not trained on this dataset, or if that is not known,
        else an empty string."""
        if self.dataset is None or "images" not in self.dataset:
            return "It is not known whether the run was trained on this data."
        changes = diff_fingerprints(compute_fingerprint(splits), self.dataset)
        return f"The run was trained on other data: {'; '.join(changes)}." if changes else ""

    def to_labels(self, classes: Classes) -> np.ndarray:
        """Converts class numbers or names to labels int32 [n]. Raises UserError if a class does not
        exist."""
        return datasets.parse_classes(classes, self.class_names)

    @functools.cached_property
    def prior(self) -> Prior:
        """The prior's module. Raises UserError if the run has no prior."""
        if self.transformer is None:
            config = shlex.quote(str(self.workdir / "config.json"))
            raise UserError(
                f"{self.workdir} has no prior yet; train one with `python train_prior.py --config "
                f"{config} --workdir {shlex.quote(str(self.workdir))}`."
            )
        return build_prior(self.config, len(self.class_names))

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Draws from the prior. Raises UserError if the run has no prior."""
        params = {"transformer": self.transformer, "generator": self.params}
        return Sampler(self.config, self.prior, self.class_names, self.model, params, self.decode)

    @functools.cached_property
    def _likelihood(self) -> Callable[..., jax.Array]:
        return jax.jit(self.prior.log_likelihood)

    def sample(
        self,
        classes: Classes,
        per_class: int = 1,
        *,
        prefix: Any = None,
        size: tuple[int, int] | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Draws images of classes (numbers or names), float32 [n,h,w,c] in [-1, 1]: `per_class` of
        the first class, then of the second, and so on.

        Image i of a class depends only on the settings, the seed, the class and i, because the size
        of the micro-batches is fixed (8 on a CPU, 256 on other devices). Another type of device
        rounds differently, and may draw other codes. `prefix` int [p] holds the first codes in
        raster order. The `settings` are optional:

        - `temperature`: 0 takes the most likely codes. `top_k` and `top_p` exclude unlikely codes.
          A `guidance_scale` above 1 emphasizes the class; a pair of scales is interpolated linearly
          from the first code to the last. A masked prior also has `decoding_steps`,
          `decoding_order` and `choice_temperature`; see docs/priors.md. None means the value of the
          run's config; to turn off guidance or top-p, pass 1.
        - `size`: height and width in pixels. If they are larger than the training images, the codes
          are drawn in windows (see `Prior.window`).
        - `seed`: default 0. `devices`: how many to use, default: all. `batch_size`: how many images
          to draw before the first ones are fetched, rounded up to whole micro-batches; default:
          one micro-batch. The next micro-batch is drawn in the meantime. `progress`: shows a
          progress bar.

        Raises UserError if a class does not exist, or if a setting is invalid.
        """
        drawing = self.sampler.plan_samples(classes, per_class, prefix, size)
        return np.concatenate(list(self.sampler.draw(drawing, **settings)))

    def complete(
        self,
        images: Any,
        classes: Classes | None = None,
        per_image: int = 1,
        *,
        keep: float = 0.5,
        mask: Any = None,
        **settings: Any,
    ) -> np.ndarray:
        """Completes images [n,h,w,c] of the training size or larger: keeps some of their codes and
        draws the others, `per_image` times for the first image, then for the second, and so on.
        Returns float32 [n*per_image,h,w,c] in [-1, 1].

        `keep` is the share of rows to keep, from the top. A bool `mask`, [h',w'] for codes or [h,w]
        for pixels, replaces `keep` and is true where codes are kept. An autoregressive prior draws
        codes in raster order, so a code depends on the codes before it, but not on kept codes after
        it. `classes` is one class for all images or one per image. None means no class, which
        requires a prior with a single class or one trained with --prior.label-dropout. `settings`
        are those of `sample`.

        Raises UserError if an argument is invalid.
        """
        codes = self.encode(images)
        drawing = self.sampler.plan_completions(codes, classes, per_image, keep, mask)
        return np.concatenate(list(self.sampler.draw(drawing, **settings)))

    def log_likelihood(self, images: Any, labels: Any) -> np.ndarray:
        """Computes the log-likelihood under the prior, in nats, of the codes of images [n,h,w,c]
        given their classes (numbers or names; one for all images, or one per image): float32 [n].

        Raises UserError if the prior has no likelihood, or not for images of this size.
        """
        labels = self.sampler.resolve_labels(labels, len(images))
        return self.code_log_likelihood(self.encode(images), labels)

    def code_log_likelihood(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Like `log_likelihood`, but takes code indices int32 [n,h',w'] and labels int32 [n]."""
        self.prior.check_likelihood(indices.shape[1:])
        return self._apply_in_batches(self._likelihood, (labels, indices), 1, self.transformer)

    def tokens(self, split: str = "train") -> Split:
        """Returns a split of the run's dataset with its images encoded as codes, unsigned int
        [n, h' * w'], without augmentation. The codes are cached in the run's folder.

        Raises UserError if the split does not exist, or if the data cannot be loaded.
        """
        if split not in ("train", "validation", "test"):
            raise UserError(f"there is no split '{split}'; choose train, validation or test.")
        splits = self.load_data()
        params = jax.tree.map(np.asarray, self.params)
        folder = self.workdir / "tokens"
        tokenizer = Tokenizer(folder, self.float32_model, params, self.config, Devices(1))
        return tokenizer(split, getattr(splits, split))

    @property
    def factor(self) -> int:
        """The height and width of a code in pixels."""
        return self.config.downsample_factor

    def encode(self, images: Any, tile: int | None = None) -> np.ndarray:
        """Encodes images [n,h,w,c] into code indices int32 [n,h',w'].

        Height and width must be multiples of `factor`. If `tile` is set, or if images have more
        than a million pixels, they are encoded in overlapping tiles of `tile` pixels per side
        (default: 1024). Raises UserError if the shape, the type or the values are invalid.
        """
        images, factor = np.asarray(images), self.factor
        channels = self.config.data.channels
        if (
            images.ndim != 4 or images.shape[3] != channels
            or any(size < factor or size % factor for size in images.shape[1:3])
        ):  # fmt: skip
            raise UserError(
                f"the images have shape {images.shape}; this run takes [n, h, w, {channels}], "
                f"with h and w multiples of {factor} (the training size is "
                f"{self.config.data.image_size})."
            )
        if images.dtype == np.uint8:
            images = to_float(images)
        elif not np.issubdtype(images.dtype, np.floating):
            raise UserError(
                f"the images have type {images.dtype}; this run takes uint8, or floats in [-1, 1]."
            )
        elif not np.abs(images).max(initial=0) <= 1.001:
            raise UserError(
                "float images must lie in [-1, 1], but some values are outside this range or NaN; "
                "pass uint8 images, or scale them with images / 127.5 - 1."
            )

        def encode(images: np.ndarray) -> np.ndarray:
            pixels = images.shape[1] * images.shape[2]
            return self._apply_in_batches(self._encode, (images,), pixels, self.params)

        return tiled_inference.encode_tiled(encode, images.astype(np.float32), factor, tile)

    def decode(self, indices: Any, tile: int | None = None) -> np.ndarray:
        """Decodes code indices int [n,h',w'], a grid of any size, into images float32 [n,h,w,c] in
        [-1, 1], in tiles like `encode`. Raises UserError if the shape, type or a code is invalid.
        """
        indices, codes = np.asarray(indices), self.config.vqgan.codebook_size
        if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
            raise UserError(
                f"the indices have shape {indices.shape} and type {indices.dtype}; this run takes "
                "integers [n, h', w']."
            )
        if not indices.size:
            raise UserError("the indices are empty; pass at least one code.")
        if indices.min() < 0 or indices.max() >= codes:
            raise UserError(f"indices must be from 0 to {codes - 1}, but some are not.")

        def decode(indices: np.ndarray) -> np.ndarray:
            pixels = indices[0].size * self.factor**2
            return self._apply_in_batches(self._decode, (indices,), pixels, self.params)

        channels = self.config.data.channels
        return tiled_inference.decode_tiled(
            decode, indices.astype(np.int32), self.factor, channels, tile
        )

    def reconstruct(self, images: Any) -> np.ndarray:
        """Encodes and decodes images [n,h,w,c]. Returns uint8 for uint8 images, and float32 in
        [-1, 1] for float images. Raises UserError like `encode`."""
        images = np.asarray(images)
        reconstruction = self.decode(self.encode(images))
        return to_uint8(reconstruction) if images.dtype == np.uint8 else reconstruction

    @staticmethod
    def _apply_in_batches(
        function: Callable[..., jax.Array], arrays: tuple[np.ndarray, ...], pixels: int, params: Any
    ) -> np.ndarray:
        """Applies a compiled function to parameters and arrays [n, ...] in batches of one size, so
        that it compiles at most twice per image size. `pixels` is the number of pixels per image.
        """
        n, limit = len(arrays[0]), max_batch(pixels, BATCH)
        if not n:
            raise UserError(
                "the batch is empty: the first dimension is 0; pass at least one image."
            )
        size = limit if n > SMALL_BATCH else min(SMALL_BATCH, limit)
        return map_batches(lambda rows: function(params, *rows), arrays, size)
