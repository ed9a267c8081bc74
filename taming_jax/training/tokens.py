"""Datasets encoded as grids of codes, stored next to the checkpoints.

`tokens/KEY/SPLIT/` holds an encoded split in files of a few thousand images each. KEY is a hash of
the generator's arrays, the images, and the augmentation settings, so files of another generator or
other images are never read. Missing and damaged files are encoded again, so that an interrupted
encoding resumes.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.data.augment import augment, center_crop
from taming_jax.data.batches import ResidentFeed, gather_batch
from taming_jax.data.datasets import Split
from taming_jax.data.pixels import to_float
from taming_jax.errors import say
from taming_jax.models.vqgan import VQGAN, encode, max_batch
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices
from taming_jax.progress import Progress
from taming_jax.storage import cache_arrays, hash_json, read_arrays
from taming_jax.training.state import AUGMENTATION, make_example_keys
from taming_jax.weights.arrays import digest, hash_arrays

IMAGES_PER_FILE = 4096


class Tokenizer:
    """Encodes the splits of a dataset as codes. Stores the codes in `folder` (a run's
    tokens/), and reads codes that are already stored."""

    def __init__(
        self,
        folder: Path,
        model: VQGAN,
        params: Any,
        config: Config,
        devices: Devices,
        say: Callable[[str], None] = say,
    ):
        self.devices, self.seed = devices, config.seed
        self._folder, self._params, self._config = folder, params, config
        self._dtype, self._say = np.min_scalar_type(config.vqgan.codebook_size - 1), say
        self._last_digest: tuple[np.ndarray | None, str] = None, ""  # images and their digest

        def encode_images(params: Any, images: jax.Array) -> jax.Array:
            indices = encode(model, params, to_float(images)).indices
            return indices.reshape(len(indices), -1)

        def encode_plain(state: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            return encode_images(
                state["params"], center_crop(gather_batch(arrays)[0], config.data.image_size)
            )

        def encode_augmented(state: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            keys = make_example_keys(config.seed, AUGMENTATION, state["version"], arrays["place"])
            return encode_images(
                state["params"], augment(gather_batch(arrays)[0], keys, config.data)
            )

        self._encode_plain, self._encode_augmented = encode_plain, encode_augmented

    def __call__(self, name: str, split: Split, version: int = 0) -> Split:
        """Returns the split with its images as codes, unsigned int [n, h' * w'] in raster order.

        Version 0 encodes the images without augmentation; every other version encodes a different
        augmentation of them.
        """
        data = self._config.data
        settings = [data.image_size]
        if version:
            settings += [data.random_crop, data.mirror, self._config.seed, version]
        if self._last_digest[0] is not split.images:  # hash the images once, not once per version
            self._last_digest = split.images, digest(split.images)
        key = hash_json([hash_arrays(self._params), self._last_digest[1], settings])[:16]
        starts = range(0, len(split.images), IMAGES_PER_FILE)
        files = {start: self._folder / key / name / f"{start:08d}.npz" for start in starts}
        stored = distributed.run_on_primary(
            lambda: {start: read_arrays(files[start]) for start in starts}
        )
        codes = {start: arrays["codes"] for start, arrays in stored.items() if arrays is not None}
        if missing := [start for start in starts if start not in codes]:
            compiled = self.devices.compile(
                self._encode_augmented if version else self._encode_plain
            )
            state = {"params": self._params, "version": np.int32(version)}
            state = self.devices.replicate(state)
            label = name + (f", version {version}" if version else "")
            size = max_batch(self._config.data.image_size**2, 256) * len(self.devices)
            parts = {
                start: Split(*(x[start : start + IMAGES_PER_FILE] for x in split))
                for start in missing
            }
            count = sum(len(part.images) for part in parts.values())
            self._say(f"Encoding {label}: {count} images.")
            with Progress(f"encoding {label}", count, "images") as progress:

                def encode_batch(batch: dict[str, np.ndarray]) -> jax.Array:
                    progress.update(size)
                    return compiled(state, self.devices.shard(batch))

                for start, part in parts.items():
                    places = np.arange(start, start + len(part.images), dtype=np.int32)
                    arrays = part._asdict() | {"place": places}
                    codes[start] = self.devices.map_batches(encode_batch, arrays, size).astype(
                        self._dtype
                    )
                    if distributed.is_primary():
                        cache_arrays(files[start], {"codes": codes[start]})
        return Split(np.concatenate([codes[start] for start in starts]), split.labels)


class TokenFeed(ResidentFeed):
    """A feed of the codes of a split, which are resident on the devices. Epoch e reads version
    e % `versions` of each example. Each version is encoded when it is first needed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        split: Split,
        batch_size: int,
        versions: int = 1,
    ):
        first = tokenizer(name, split)
        self._encode = functools.partial(tokenizer, name, split)
        # Allocate all versions now, so that the step that reads them is compiled only once.
        self._codes = np.zeros((versions, *first.images.shape), first.images.dtype)
        self._codes[0] = first.images
        self._encoded_versions = {0}
        self._labels = np.tile(first.labels, versions)
        super().__init__(
            Split(self._rows(), self._labels), batch_size, tokenizer.seed, tokenizer.devices
        )
        self.size = len(first.images)

    def _rows(self) -> np.ndarray:
        return self._codes.reshape(-1, self._codes.shape[-1])

    def _locate_rows(self, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
        versions = epochs % len(self._codes)
        missing = set(versions.tolist()) - self._encoded_versions
        for version in sorted(missing):
            self._codes[version] = self._encode(version).images
            self._encoded_versions.add(version)
        if missing:
            self._resident |= self._devices.replicate({"images": self._rows()})
        return versions * np.int32(self.size) + index
