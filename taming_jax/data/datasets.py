"""From a dataset's name to its images.

A source is a function of the data settings that returns `Splits`. A new dataset is one such
function, its line in `SOURCES`, and a preset.
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
from taming_jax.data.augment import centred, stored_size
from taming_jax.data.images import Pictures, Table, decode_split
from taming_jax.errors import UserError, say
from taming_jax.parallel import distributed


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
    if config.name == UNKNOWN:
        raise UserError(
            "the dataset of this imported run is not known; name one with --data.name and "
            "--data.path (in a notebook with data={'name': …, 'path': …})."
        )
    if config.path is not None and not Path(config.path).is_dir():
        raise UserError(f"--data.path {config.path} is no folder; name the one with the data.")
    if config.name in SOURCES:
        return SOURCES[config.name](config)
    if config.name.startswith("tfds:"):
        return build_splits(readers.tfds(config), config)
    if "/" in config.name:
        return build_splits(readers.hub(config), config)
    raise UserError(
        f"--data.name {config.name} is unknown; the datasets are {', '.join(sorted(SOURCES))}, "
        "OWNER/NAME of the Hugging Face hub, and tfds:NAME of TensorFlow Datasets."
    )


def class_numbers(classes: int | str | Iterable[int | str], names: Sequence[str]) -> np.ndarray:
    """Classes by number or by name as numbers, int32 [n]; a string is a name before it is a number.
    UserError for others."""
    numbers = {name: i for i, name in enumerate(names)}

    def number(given: int | str) -> int:
        if isinstance(given, str):
            value = numbers.get(given, int(given) if given.isdecimal() else -1)
        else:
            value = operator.index(given)
        if 0 <= value < len(names):
            return value
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise UserError(
            f"there is no class '{given}'; the classes are 0 to {len(names) - 1}: {shown}."
        )

    if isinstance(classes, int | str | np.integer):
        classes = [classes]
    return np.array([number(given) for given in classes], np.int32)


def load_same(load: Callable[[], Splits]) -> tuple[Splits, dict[str, Any]]:
    """What `load` returns, and its fingerprint, which must be the same in all processes. Raises
    UserError in all of them where it is not, or where one cannot load it."""
    splits = distributed.run_on_all(load)
    own = fingerprint(splits)
    advice = "Give all processes the same data, by --data.path."
    distributed.check_equal(own, fingerprint_diff, advice)
    return splits, own


def evenly_spaced(n: int, most: int) -> np.ndarray:
    """The places of n things, or of `most` of them, evenly from the first to the last."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


def fingerprint(splits: Splits) -> dict[str, Any]:
    """What a dataset is known by when a run goes on: plain values that JSON can hold. `means` are
    of some training and validation images: of other pictures they are others, while another
    version of a decoder, which rounds otherwise, changes them by less than 1."""

    def means(images: np.ndarray) -> list[float]:
        return [round(float(images[i].mean()), 2) for i in evenly_spaced(len(images), 64)]

    chosen = {"training": splits.train, "validation": splits.validation}
    return {
        "images": {name: len(split.images) for name, split in chosen.items()},
        "means": {name: means(split.images) for name, split in chosen.items()},
        "class_names": list(splits.class_names),
    }


def fingerprint_diff(now: dict[str, Any] | None, then: dict[str, Any] | None) -> list[str]:
    """How a dataset is another than it was, by their identities, a phrase a difference; nothing
    where one of them is not known, or of an imported run, which knows names of classes alone."""
    found: list[str] = []
    if now is None or then is None or "images" not in then:
        return found
    for name, count in then["images"].items():
        if now["images"][name] != count:
            found.append(f"there are {now['images'][name]} {name} images, not {count}")
    names, before = now["class_names"], then["class_names"]
    if len(names) != len(before):
        found.append(f"there are {len(names)} classes, not {len(before)}")
    elif names != before:
        one, other = next(pair for pair in zip(names, before, strict=True) if pair[0] != pair[1])
        found.append(f"a class is called '{one}', not '{other}'")
    if not found:
        for name, means in then["means"].items():
            if max(np.abs(np.subtract(now["means"][name], means))) > 1:
                found.append(f"the {name} images are others")
    return found


def cut_validation(train: Split, config: DataConfig) -> tuple[Split, Split]:
    """Cuts the validation split from the training split: the same images for the same seed, both
    in the order they had. At least one image is left on either side."""
    parts = cut_by_seed(len(train.images), config.validation_share, config.split_seed)
    first, second = (Split(train.images[part], train.labels[part]) for part in parts)
    return first, Split(centred(second.images, config.image_size), second.labels)


def cut_by_seed(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n examples in two parts, the second of about a share of them, each in order: the same for the
    same seed. At least one is on either side."""
    kept = min(max(round(n * share), 1), n - 1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(n)
    return np.sort(order[kept:]), np.sort(order[:kept])


def mnist(config: DataConfig) -> Splits:
    """MNIST (LeCun, Cortes, Burges) from its four IDX files, the package's own or one's own copy
    in `config.path`, with or without `.gz`."""
    if config.image_size != 28 or config.channels != 1 or config.random_crop:
        raise UserError(
            "MNIST images are 28x28 and gray; take --data.image-size 28 and --data.channels 1, and "
            "leave --data.random-crop out."
        )
    package: Traversable = resources.files("taming_jax.data") / "mnist"
    folder = package if config.path is None else Path(config.path)

    def split(prefix: str) -> Split:
        images = read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        n, height, width = images.shape
        if n < 2 or n != len(labels) or (height, width) != (28, 28) or labels.max() > 9:
            raise UserError(
                f"the MNIST files '{prefix}-…' in {folder} hold {n} images of {height}x{width} and "
                f"{len(labels)} labels up to {labels.max(initial=0)}; replace them with the "
                "original ones."
            )
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
    shape = tuple(map(int, np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4")))
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + np.prod(shape):
        raise UserError(
            f"{file} is truncated, or no IDX file of {dimensions} dimensions; replace it."
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


def folder(config: DataConfig) -> Splits:
    """One's own pictures in `config.path`: a folder a class, or one folder."""
    return build_splits(readers.folder(config), config)


def build_splits(tables: dict[str, Table], config: DataConfig) -> Splits:
    """Encoded pictures as Splits. What the data does not have as a split of its own is cut from
    its training split, by seed. Raises UserError where there is nothing to train on, or too many
    pictures cannot be read."""
    tables = {split: table for split, table in tables.items() if len(table.names)}
    if "train" not in tables:
        raise UserError(f"{config.path or config.name} has no split 'train', or an empty one.")
    labels, class_names = encode_labels(tables, config)
    pictures = {
        split: Pictures(table, np.arange(len(table.names)), labels[split])
        for split, table in tables.items()
    }
    for split, share in (("test", config.test_share), ("validation", config.validation_share)):
        if split not in pictures:
            n = len(pictures["train"])
            if n < 2:
                raise UserError(
                    f"{config.path or config.name} holds too few pictures: a {split} split cannot "
                    "be cut from one; three are the least."
                )
            rest, cut = cut_by_seed(n, share, config.split_seed)
            pictures[split] = pictures["train"].part(cut)
            pictures["train"] = pictures["train"].part(rest)
    parts, problems, count = {}, [], sum(map(len, pictures.values()))
    for split in ("train", "validation", "test"):
        size = stored_size(config) if split == "train" else config.image_size
        decoded = decode_split(pictures[split], size, config, split)
        parts[split] = Split(decoded.images, decoded.labels)
        if decoded.problem:
            problems.append(f"{split}: {decoded.problem}")
    if (
        count - sum(len(part.images) for part in parts.values())
        > config.max_corrupt_fraction * count
    ):
        raise UserError(
            f"{'; '.join(problems)}. Mend or remove them, or allow a larger share by "
            "--data.max-corrupt-fraction."
        )
    for problem in problems:
        say(f"{problem}, and left out.")
    unlearned = set(parts["test"].labels.tolist()) - set(parts["train"].labels.tolist())
    if unlearned:
        say(
            f"Warning: {len(unlearned)} classes are in the test split only; likelihoods of their "
            "images, given their class, mean little."
        )
    return Splits(**parts, class_names=class_names)


def encode_labels(
    tables: dict[str, Table], config: DataConfig
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Classes as numbers int32 [n] by split, and their names. UserError where some are missing, or
    are neither names nor numbers from 0."""
    where = config.path or config.name
    classes = {split: table.classes or [None] * len(table.names) for split, table in tables.items()}
    values = [value for of_split in classes.values() for value in of_split]
    names: tuple[str, ...]
    numbers: dict[Any, int]
    if all(value is None for value in values):
        names, numbers = ("all",), {None: 0}
    elif any(value is None for value in values):
        raise UserError(f"some pictures of {where} have no class; give every one a class.")
    elif all(isinstance(value, str) for value in values):
        learned = set(classes["train"])
        names = (*sorted(learned), *sorted(set(values) - learned))
        numbers = {name: i for i, name in enumerate(names)}
    elif all(isinstance(value, int | np.integer) for value in values):
        names = next((table.class_names for table in tables.values() if table.class_names), ())
        most = len(names) or 1000 + 10 * len(values)  # others are no classes, but identifiers
        if not 0 <= min(values) <= max(values) < most:
            raise UserError(
                f"the classes of {where} go from {min(values)} to {max(values)}; count them from 0 "
                f"to at most {most - 1}."
            )
        names = names or tuple(map(str, range(max(values) + 1)))
        numbers = {i: i for i in range(len(names))}
    else:
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise UserError(
            f"the classes of {where} are of type {kinds}; numbers from 0, or names, are taken "
            "(--data.label-column)."
        )
    labels = {
        split: np.array([numbers[value] for value in of_split], np.int32)
        for split, of_split in classes.items()
    }
    return labels, names


SOURCES: dict[str, Callable[[DataConfig], Splits]] = {
    "mnist": mnist,
    "synthetic": synthetic,
    "folder": folder,
}
