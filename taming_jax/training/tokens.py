"""A dataset as grids of codes, encoded once and kept beside the checkpoints.

`tokens/KEY/SPLIT/` holds an encoded split in files of some thousand images each. KEY is a hash of
the generator's arrays, the images themselves and how they are augmented, so a file of another
generator or of other images is never read. A file that is missing or damaged is encoded again, so
an encoding that was stopped resumes.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.data.augment import augmented, centred
from taming_jax.data.batches import ResidentFeed, gather_batch
from taming_jax.data.datasets import Split
from taming_jax.data.pixels import to_float
from taming_jax.errors import say
from taming_jax.models.vqgan import VQGAN, encode, max_batch
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices
from taming_jax.progress import Progress
from taming_jax.storage import read_arrays, text_hash, write_arrays
from taming_jax.training.state import AUGMENTATION, example_keys
from taming_jax.weights.arrays import digest, hash_arrays

FILE = 4096  # images a file


class Tokenizer:
    """A generator that encodes splits of a dataset into `folder` (a run's tokens/), or reads them
    from there."""

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
        self._known: tuple[np.ndarray | None, str] = None, ""  # the last images, and their digest

        def codes(params: Any, images: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                indices = encode(model, params, to_float(images)).indices
            return indices.reshape(len(indices), -1)

        def plain(state: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            return codes(state["params"], centred(gather_batch(arrays)[0], config.data.image_size))

        def changed(state: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            keys = example_keys(config.seed, AUGMENTATION, state["version"], arrays["place"])
            return codes(state["params"], augmented(gather_batch(arrays)[0], keys, config.data))

        self._plain, self._changed = plain, changed

    def __call__(self, name: str, split: Split, version: int = 0) -> Split:
        """The split with its images as codes, unsigned [n, h' * w'] in raster order. Version 0 is
        of the images as they are, others of the images augmented, each in another way. Products
        are computed at the highest precision."""
        data = self._config.data
        seen = [data.image_size]
        if version:
            seen += [data.random_crop, data.mirror, self._config.seed, version]
        if self._known[0] is not split.images:  # read through once, not for each version
            self._known = split.images, digest(split.images)
        key = text_hash([hash_arrays(self._params), self._known[1], seen])[:16]
        starts = range(0, len(split.images), FILE)
        files = {at: self._folder / key / name / f"{at:08d}.npz" for at in starts}
        held = distributed.run_on_primary(lambda: {at: read_arrays(files[at]) for at in starts})
        codes = {at: kept["codes"] for at, kept in held.items() if kept is not None}
        if missing := [at for at in starts if at not in codes]:
            compiled = self.devices.compile(self._changed if version else self._plain)
            state = {"params": self._params, "version": np.int32(version)}
            state = self.devices.replicate(state)
            label = name + (f", version {version}" if version else "")
            size = max_batch(self._config.data.image_size**2, 256) * len(self.devices)
            parts = {at: Split(*(x[at : at + FILE] for x in split)) for at in missing}
            count = sum(len(part.images) for part in parts.values())
            self._say(f"Encoding {label}: {count} images.")
            with Progress(f"encoding {label}", count, "images") as progress:

                def encode(rows: dict[str, np.ndarray]) -> jax.Array:
                    progress.update(size)
                    return compiled(state, self.devices.shard(rows))

                for start, part in parts.items():
                    places = np.arange(start, start + len(part.images), dtype=np.int32)
                    arrays = part._asdict() | {"place": places}
                    codes[start] = self.devices.map_batches(encode, arrays, size).astype(
                        self._dtype
                    )
                    if distributed.is_primary():
                        write_arrays(files[start], {"codes": codes[start]})
        return Split(np.concatenate([codes[start] for start in starts]), split.labels)


class TokenFeed(ResidentFeed):
    """A split on the devices as codes. In epoch e the stream reads version e % `versions` of each
    example; a version is encoded when it is first needed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        split: Split,
        batch_size: int,
        versions: int = 1,
    ):
        first = tokenizer(name, split)
        self._encoded = functools.partial(tokenizer, name, split)
        # Room for all versions, so that the step that reads them is compiled once.
        self._codes = np.zeros((versions, *first.images.shape), first.images.dtype)
        self._codes[0] = first.images
        self._held = {0}
        self._labels = np.tile(first.labels, versions)
        super().__init__(
            Split(self._rows(), self._labels), batch_size, tokenizer.seed, tokenizer.devices
        )
        self.size = len(first.images)

    def _rows(self) -> np.ndarray:
        return self._codes.reshape(-1, self._codes.shape[-1])

    def _index(self, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
        versions = epochs % len(self._codes)
        missing = set(versions.tolist()) - self._held
        for version in sorted(missing):
            self._codes[version] = self._encoded(version).images
            self._held.add(version)
        if missing:
            self._resident |= self._devices.replicate({"images": self._rows()})
        return versions * np.int32(self.size) + index
