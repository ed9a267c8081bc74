"""Loads the images of a dataset by its name.

A source is a function that takes the data settings and returns `Splits`. To add a dataset, write a
source, add it to `SOURCES`, and add a preset.
"""

import gzip
import operator
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from taming_jax.config.schema import UNKNOWN, DataConfig
from taming_jax.data import readers
from taming_jax.data.augment import center_crop, get_stored_size
from taming_jax.data.images import EncodedImages, Table, decode_split
from taming_jax.errors import UserError, say


class Split(NamedTuple):
    """Images uint8 [n,h,w,c] and their classes int32 [n].

    Training images have the size that `get_stored_size` (augment.py) returns, all others the size
    that the model sees."""

    images: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """A dataset: `train` to fit models on, `validation` to choose them, `test` to evaluate them."""

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]


def load(config: DataConfig) -> Splits:
    """Loads the dataset that the settings name.

    Raises UserError if the name is unknown, files are missing or damaged, or the source does not
    support the image size.
    """
    if config.name == UNKNOWN:
        raise UserError(
            "the dataset of this imported run is not known; name it with --data.name and, if it "
            "needs one, --data.path (in a notebook, data={'name': …, 'path': …})."
        )
    if config.path is not None and not Path(config.path).is_dir():
        raise UserError(
            f"--data.path {config.path} is not a folder; name the folder with your data."
        )
    if config.name in SOURCES:
        return SOURCES[config.name](config)
    if config.name.startswith("tfds:"):
        return build_splits(readers.read_tfds(config), config)
    if "/" in config.name:
        return build_splits(readers.read_hub(config), config)
    raise UserError(
        f"--data.name {config.name} is unknown; the datasets are {', '.join(sorted(SOURCES))}, "
        "OWNER/NAME from the Hugging Face hub, and tfds:NAME from TensorFlow Datasets."
    )


def parse_classes(classes: int | str | Iterable[int | str], names: Sequence[str]) -> np.ndarray:
    """Converts one or more classes, given by number or by name, to numbers int32 [n].

    A string that is both a name and a number is read as the name. Raises UserError if a class does
    not exist.
    """
    numbers = {name: i for i, name in enumerate(names)}

    def parse_class(value: int | str) -> int:
        if isinstance(value, str):
            number = numbers.get(value, int(value) if value.isdecimal() else -1)
        else:
            number = operator.index(value)
        if 0 <= number < len(names):
            return number
        listing = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise UserError(
            f"there is no class '{value}'; the classes are 0 to {len(names) - 1}: {listing}."
        )

    if isinstance(classes, int | str | np.integer):
        classes = [classes]
    return np.array([parse_class(value) for value in classes], np.int32)


def evenly_spaced(n: int, limit: int) -> np.ndarray:
    """Returns at most `limit` indices of n items, evenly spaced from the first to the last."""
    return np.linspace(0, n - 1, min(n, limit)).astype(int)


def hold_out_validation(train: Split, config: DataConfig) -> tuple[Split, Split]:
    """Splits the training images into a training and a validation split.

    `split_seed` determines the selection. Both splits keep the order of the images and hold at
    least one image.
    """
    parts = split_by_seed(len(train.images), config.validation_share, config.split_seed)
    rest, held_out = (Split(train.images[part], train.labels[part]) for part in parts)
    return rest, Split(center_crop(held_out.images, config.image_size), held_out.labels)


def split_by_seed(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the indices of n examples at random into two sorted parts.

    The second part holds about the fraction `share` of the examples. Each part holds at least one.
    The same seed gives the same parts.
    """
    count = min(max(round(n * share), 1), n - 1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(n)
    return np.sort(order[count:]), np.sort(order[:count])


def load_mnist(config: DataConfig) -> Splits:
    """Loads MNIST (LeCun, Cortes, Burges) from its four IDX files, with or without `.gz`.

    The files are read from `config.path`, by default from the copy in the package. Raises UserError
    if the settings do not fit MNIST, or a file is missing or damaged.
    """
    if config.image_size != 28 or config.channels != 1 or config.random_crop:
        raise UserError(
            "MNIST images are 28x28 and grayscale; use --data.image-size 28 and --data.channels 1, "
            "and leave --data.random-crop off."
        )
    package: Traversable = resources.files("taming_jax.data") / "mnist"
    folder = package if config.path is None else Path(config.path)

    def read_split(prefix: str) -> Split:
        images = read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        n, height, width = images.shape
        if n < 2 or n != len(labels) or (height, width) != (28, 28) or labels.max() > 9:
            raise UserError(
                f"the MNIST files '{prefix}-…' in {folder} hold {n} images of {height}x{width} and "
                f"{len(labels)} labels up to {labels.max(initial=0)}; replace them with the "
                "original files."
            )
        return Split(images[..., None], labels.astype(np.int32))

    train, validation = hold_out_validation(read_split("train"), config)
    return Splits(train, validation, read_split("t10k"), tuple("0123456789"))


def read_idx(folder: Traversable, name: str, dimensions: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, with or without `.gz`.

    The format is two zero bytes, the type (8), the number of dimensions, the size of each dimension
    as a big-endian 32-bit integer, then the values. Raises UserError if the file is missing or
    damaged.
    """
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            break
    else:
        raise UserError(f"{folder} has no {name}.gz; put the four IDX files of MNIST there.")
    try:
        content = file.read_bytes()
        if file.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is truncated or damaged ({error}); replace it.") from error
    header = 4 + 4 * dimensions
    shape = tuple(map(int, np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4")))
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + np.prod(shape):
        raise UserError(
            f"{file} is truncated, or not an IDX file with {dimensions} dimensions; replace it."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def make_synthetic(config: DataConfig) -> Splits:
    """Makes images of simple shapes, of any size, for tests and first experiments.

    There are four classes. An image of class n shows a disc (even n) or a square (odd n) at a
    random position; n also determines the brightness and size of the shape. The training and
    validation splits hold 512 images together, and the test split holds 64.
    """
    rng = np.random.Generator(np.random.Philox(0))
    n, size = 576, get_stored_size(config)
    labels = rng.integers(0, 4, n).astype(np.int32)
    rows, columns = np.mgrid[:size, :size]
    center = rng.uniform(0.3, 0.7, (2, n, 1, 1)) * size
    distances = np.abs(rows - center[0]), np.abs(columns - center[1])
    radius = (0.15 + 0.05 * labels[:, None, None]) * size
    inside = np.where(labels[:, None, None] % 2, np.maximum(*distances), np.hypot(*distances))
    inside = inside <= radius
    brightness = (255 - 40 * labels)[:, None, None, None]
    tint = np.linspace(1.0, 0.6, config.channels)
    images = (inside[..., None] * brightness * tint).astype(np.uint8)
    train, validation = hold_out_validation(Split(images[:512], labels[:512]), config)
    test = Split(center_crop(images[512:], config.image_size), labels[512:])
    return Splits(train, validation, test, ("disc", "square", "large disc", "large square"))


def build_splits(tables: dict[str, Table], config: DataConfig) -> Splits:
    """Decodes the encoded images of a dataset into splits.

    A missing test or validation split is taken at random from the training split. Raises UserError
    if there are too few training images to do so, or too many images cannot be read.
    """
    source = config.path or config.name
    tables = {split: table for split, table in tables.items() if len(table.names)}
    if "train" not in tables:
        raise UserError(f"{source} has no training pictures; put some into a split named 'train'.")
    labels, class_names = encode_labels(tables, config)
    encoded = {}
    for split, table in tables.items():
        numbers = np.flatnonzero(labels[split] >= 0)
        if len(numbers):
            encoded[split] = EncodedImages(table, numbers, labels[split][numbers])
        if len(numbers) < len(table.names):
            say(
                f"{split}: {len(table.names) - len(numbers)} pictures without a class are left out."
            )
    for split, share in (("test", config.test_share), ("validation", config.validation_share)):
        if split not in encoded:
            n = len(encoded["train"])
            if n < 2:
                raise UserError(
                    f"{source} has too few training pictures to hold out a {split} split; add more "
                    "training pictures."
                )
            rest, held_out = split_by_seed(n, share, config.split_seed)
            encoded[split] = encoded["train"].select(held_out)
            encoded["train"] = encoded["train"].select(rest)
    parts, problems, count = {}, [], sum(map(len, encoded.values()))
    for split in ("train", "validation", "test"):
        size = get_stored_size(config) if split == "train" else config.image_size
        decoded = decode_split(encoded[split], size, config, split)
        parts[split] = Split(decoded.images, decoded.labels)
        if decoded.problem:
            problems.append(f"{split}: {decoded.problem}")
    unreadable = count - sum(len(part.images) for part in parts.values())
    if unreadable > config.max_corrupt_fraction * count:
        raise UserError(
            f"{'; '.join(problems)}. Fix or remove them, or raise --data.max-corrupt-fraction."
        )
    for problem in problems:
        say(f"{problem}. They are left out.")
    splits = Splits(**parts, class_names=class_names)
    if untrained := find_untrained(splits):
        names = ", ".join(class_names[i] for i in untrained[:20]) + ", …" * (len(untrained) > 20)
        say(
            f"Warning: there are no training pictures for {len(untrained)} of {len(class_names)} "
            f"classes: {names}. The prior does not learn them, and they are not drawn by default."
        )
    return splits


def find_untrained(splits: Splits) -> list[int]:
    """Returns the classes that no training image has."""
    return np.setdiff1d(np.arange(len(splits.class_names)), splits.train.labels).tolist()


def encode_labels(
    tables: dict[str, Table], config: DataConfig
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the classes of each split as numbers int32 [n], and the names of all classes.

    Validation and test images may have no class (see `is_unlabeled`), which is encoded as -1.
    Raises UserError if some training images have none, or classes are neither names nor numbers
    from 0."""
    source = config.path or config.name
    classes = {split: table.classes or [None] * len(table.names) for split, table in tables.items()}
    trained: set[Any] = {
        value for value in classes["train"] if isinstance(value, str | int | np.integer)
    }
    if trained:
        for split in classes.keys() - {"train"}:
            classes[split] = [
                None if is_unlabeled(value) and value not in trained else value
                for value in classes[split]
            ]
    values = [
        value
        for split, split_values in classes.items()
        for value in split_values
        if split == "train" or not trained or value is not None
    ]
    names: tuple[str, ...]
    numbers: dict[Any, int]
    if all(value is None for value in values):
        names, numbers = ("all",), {None: 0}
    elif any(value is None for value in values):
        raise UserError(f"some pictures of {source} have no class; give every picture a class.")
    elif all(isinstance(value, str) for value in values):
        names = (*sorted(trained), *sorted(set(values) - trained))
        numbers = {name: i for i, name in enumerate(names)}
    elif all(isinstance(value, int | np.integer) for value in values):
        names = next((table.class_names for table in tables.values() if table.class_names), ())
        limit = len(names) or 1000 + 10 * len(values)  # larger numbers are probably identifiers
        if not 0 <= min(values) <= max(values) < limit:
            raise UserError(
                f"the classes of {source} go from {min(values)} to {max(values)}; number them from "
                f"0 to at most {limit - 1}, or choose another --data.label-column."
            )
        names = names or tuple(map(str, range(max(values) + 1)))
        numbers = {i: i for i in range(len(names))}
    else:
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise UserError(
            f"the classes of {source} are of type {kinds}; choose a column of names, or of numbers "
            "from 0, with --data.label-column."
        )
    labels = {
        split: np.array([numbers.get(value, -1) for value in split_values], np.int32)
        for split, split_values in classes.items()
    }
    return labels, names


def is_unlabeled(value: Any) -> bool:
    """Returns whether a label stands for an unknown class: None, "", "?", "-1", NaN, or a
    negative number."""
    if isinstance(value, str):
        return value.strip() in ("", "?", "-1")
    return value is None or (isinstance(value, int | float | np.number) and not value >= 0)


SOURCES: dict[str, Callable[[DataConfig], Splits]] = {
    "mnist": load_mnist,
    "synthetic": make_synthetic,
    "folder": lambda config: build_splits(readers.read_path(config), config),
}
