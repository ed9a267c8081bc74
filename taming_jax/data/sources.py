"""From a dataset's name to its images.

A source is a function of the data settings that answers `Splits`. A new dataset is one such
function, its line in `SOURCES`, and a preset.
"""

import gzip
import zlib
from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taming_jax.config import DataConfig
from taming_jax.data.augment import centred, stored_size
from taming_jax.errors import UserError


class Split(NamedTuple):
    """Images uint8 [n,h,w,c] with their classes int32 [n]. Training images are of augment.py's
    `stored_size`, the others of the size that the model sees."""

    images: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """A dataset. Models are fitted on `train`, chosen on `validation`, and told by `test`."""

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]


def load(config: DataConfig) -> Splits:
    """The dataset that the settings name.

    Raises UserError for an unknown name, files that are missing or damaged, and image sizes that
    the source cannot give.
    """
    if config.name not in SOURCES:
        raise UserError(
            f"--data.name {config.name} is unknown; the datasets are {', '.join(sorted(SOURCES))}."
        )
    return SOURCES[config.name](config)


def cut_validation(train: Split, config: DataConfig) -> tuple[Split, Split]:
    """Cuts the validation split from the training split: the same images for the same seed, both
    in the order they had. At least one image is left on either side."""
    n = len(train.images)
    kept = min(max(round(n * config.validation_share), 1), n - 1)
    order = np.random.Generator(np.random.Philox(config.split_seed)).permutation(n)
    parts = np.sort(order[kept:]), np.sort(order[:kept])
    first, second = (Split(train.images[part], train.labels[part]) for part in parts)
    return first, Split(centred(second.images, config.image_size), second.labels)


def mnist(config: DataConfig) -> Splits:
    """MNIST (LeCun, Cortes, Burges) from its four IDX files, the package's own or one's own copy
    in `config.path`, with or without `.gz`."""
    if config.image_size != 28 or config.channels != 1:
        raise UserError(
            f"MNIST images are 28x28 and gray; --data.image-size {config.image_size} with "
            f"--data.channels {config.channels} cannot be had (take 28 and 1)."
        )
    if config.random_crop:
        raise UserError("MNIST images are no larger than 28x28; leave --data.random-crop out.")
    folder: Traversable
    if config.path is None:
        folder = resources.files("taming_jax.data") / "mnist"
    else:
        folder = Path(config.path)
        if not folder.is_dir():
            raise UserError(f"--data.path {config.path} is no folder; name one with MNIST's files.")

    def split(prefix: str) -> Split:
        images = read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or len(images) < 2:
            raise UserError(
                f"the MNIST files '{prefix}-…' in {folder} hold {len(images)} images of "
                f"{images.shape[1]}x{images.shape[2]} and {len(labels)} labels; "
                "replace them with the original ones."
            )
        if labels.max() > 9:
            raise UserError(f"the MNIST labels '{prefix}-…' in {folder} go beyond 9; replace them.")
        return Split(images[..., None], labels.astype(np.int32))

    train, validation = cut_validation(split("train"), config)
    return Splits(train, validation, split("t10k"), tuple("0123456789"))


def read_idx(folder: Traversable, name: str, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, the type (8), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            break
    else:
        raise UserError(f"{folder} has no {name}.gz; put MNIST's four IDX files there.")
    try:
        content = file.read_bytes()
        if file.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is truncated or damaged ({error}); replace it.") from error
    header = 4 + 4 * dimensions
    shape = tuple(
        int(n) for n in np.frombuffer(content[4:header], ">u4", len(content[4:header]) // 4)
    )
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(shape) != dimensions:
        raise UserError(f"{file} is no IDX file of {dimensions} dimensions; replace it.")
    if len(content) != header + int(np.prod(shape)):
        raise UserError(
            f"{file} is truncated: it promises {int(np.prod(shape))} values and holds "
            f"{len(content) - header}; replace it."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def synthetic(config: DataConfig) -> Splits:
    """Small pictures made by rule, for tests and first tries of any size: class n is a disc (even
    n) or a square (odd n) at a random place, its brightness and size by n. 512 to train, 64 to
    test, four classes."""
    rng = np.random.Generator(np.random.Philox(0))
    n, size = 576, stored_size(config)
    labels = rng.integers(0, 4, n).astype(np.int32)
    rows, columns = np.mgrid[:size, :size]
    centre = rng.uniform(0.3, 0.7, (2, n, 1, 1)) * size
    away = np.abs(rows - centre[0]), np.abs(columns - centre[1])
    radius = (0.15 + 0.05 * labels[:, None, None]) * size
    inside = np.where(labels[:, None, None] % 2, np.maximum(*away), np.hypot(*away)) <= radius
    brightness = (255 - 40 * labels)[:, None, None, None]
    tint = np.linspace(1.0, 0.6, config.channels)
    images = (inside[..., None] * brightness * tint).astype(np.uint8)
    train, validation = cut_validation(Split(images[:512], labels[:512]), config)
    test = Split(centred(images[512:], config.image_size), labels[512:])
    return Splits(train, validation, test, ("disc", "square", "large disc", "large square"))


SOURCES: dict[str, Callable[[DataConfig], Splits]] = {"mnist": mnist, "synthetic": synthetic}
