"""Where encoded pictures come from: folders, parquet files, the Hugging Face hub, TensorFlow
Datasets. Each function returns a table per split, by "train", "validation" and "test"."""

import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from taming_jax.config.schema import DataConfig
from taming_jax.data.images import Table, cache_folder
from taming_jax.errors import UserError, say
from taming_jax.storage import hash_json

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
# What a split may be called; the first name is a prefix of the others.
SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}


def find_splits(exists: Callable[[str], bool]) -> dict[str, str]:
    """The names of the splits that exist, by "train", "validation" and "test"."""
    return {split: name for split, names in SPLITS.items() for name in names if exists(name)}


def hash_files(files: Iterable[Path]) -> str:
    """A hash of files' contents."""

    def hash_file(file: Path) -> bytes:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "blake2b").digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(hash_file, files))).hexdigest()


@dataclass(frozen=True)
class Files:
    """Pictures that are files of their own."""

    paths: list[Path]

    def __getitem__(self, number: int) -> bytes:
        return self.paths[number].read_bytes()


def folder(config: DataConfig) -> dict[str, Table]:
    """`train/CLASS/*` with or without `validation/` and `test/`, or `CLASS/*`, or pictures alone;
    classes are named by their folders. What belongs to no split or class is left out, and a
    sentence says so. UserError where there are no pictures, or one cannot be read."""
    if config.path is None:
        raise UserError("--data.name folder needs --data.path, the folder with your pictures.")
    try:
        return folder_tables(Path(config.path))
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); give yourself the right to."
        ) from error


def folder_tables(root: Path) -> dict[str, Table]:
    splits = find_splits(lambda name: (root / name).is_dir())
    folders = {split: root / name for split, name in splits.items()}
    if "train" in folders:
        left_out = [place for place in root.iterdir() if place not in folders.values()]
    else:
        folders, left_out = {"train": root}, []
    tables = {}
    for split, place in folders.items():
        files = sorted(pictures_below(place))
        if not files:
            kinds = " ".join(sorted(SUFFIXES))
            raise UserError(f"{place} holds no pictures ({kinds}); put some there.")
        in_classes = [file for file in files if file.parent != place]
        if in_classes:  # pictures beside the folders have no class
            left_out += [file for file in files if file.parent == place]
            files = in_classes
        classes = [file.relative_to(place).parts[0] for file in in_classes] or None
        names = [str(file.relative_to(root)) for file in files]
        tables[split] = Table(Files(files), names, classes, (), hash_files(files))
    left_out = [
        place for place in left_out
        if not place.name.startswith(".") and (place.is_dir() or is_picture(place))
    ]  # fmt: skip
    if left_out:
        which = "a class" if root in folders.values() else "a split"
        say(f"Left out, as they are in no folder of {which}: {len(left_out)}, {left_out[0]} first.")
    return tables


def pictures_below(place: Path) -> Iterator[Path]:
    """The pictures in a folder and its folders, linked ones too, without hidden ones. OSError
    where one cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, below, names in os.walk(place, onerror=refuse, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from filter(is_picture, (Path(folder, name) for name in names))


def is_picture(file: Path) -> bool:
    hidden = file.name.startswith(".")
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


@dataclass(frozen=True)
class Column:
    """Encoded pictures in a column of rows: bytes, or the hub's structs of bytes or a path."""

    rows: Any
    column: str

    def __getitem__(self, number: int) -> bytes:
        value = self.rows[number][self.column]
        if isinstance(value, dict):
            value = value["bytes"] or Path(value["path"]).read_bytes()
        return value


class Columns(NamedTuple):
    """The columns of images and of classes (None where there are no classes), and the names of the
    classes, empty where these are not numbers with names."""

    image: str
    label: str | None
    class_names: tuple[str, ...]


def column_table(
    split: str, rows: Any, columns: Columns, classes: Sequence[Any] | None, content: str
) -> Table:
    """The table of rows that are not decoded; `content` changes when a row does."""
    names = [f"{split}, row {i}" for i in range(len(rows))]
    reader = Column(rows, columns.image)
    return Table(reader, names, classes, columns.class_names, f"{columns.image} {content}")


def choose_columns(
    config: DataConfig, features: Mapping[str, Any], images: Sequence[str], label_kind: type
) -> Columns:
    """The columns that the settings name, or else the first of `images` and the first of the kind
    of labels, or called so. UserError where there are none of images, or no column of a setting's
    name."""
    names = list(features)
    if not images:
        raise UserError(f"the dataset has no column of images; its columns are {', '.join(names)}.")
    image = config.image_column or images[0]
    if image not in images:
        raise UserError(
            f"the dataset has no column '{image}' that holds images; {', '.join(images)} does "
            "(--data.image-column)."
        )
    labels = [name for name in names if isinstance(features[name], label_kind)]
    labels += [name for name in ("label", "labels") if name in names]
    label = config.label_column or next(iter(labels), None)
    if label is None:
        return Columns(image, None, ())
    if label not in names:
        raise UserError(
            f"the dataset has no column '{label}'; its columns are {', '.join(names)} "
            "(--data.label-column)."
        )
    return Columns(image, label, tuple(getattr(features[label], "names", None) or ()))


def holds_images(feature: Any, image_kind: type) -> bool:
    """Whether a column holds pictures: by its kind, as bytes, or as the hub's structs of bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, image_kind) or binary


def import_package(name: str, config: DataConfig) -> Any:
    """A package that only some datasets need. UserError where it is not installed."""
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        raise UserError(
            f"--data.name {config.name} needs the package {name}; pip install {name}."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def hub(config: DataConfig) -> dict[str, Table]:
    """A dataset of the Hugging Face hub, or its parquet files in `config.path`, by `datasets`."""
    datasets = import_package("datasets", config)
    datasets.disable_progress_bars()
    if config.path is not None:
        return parquet(datasets, Path(config.path), config)
    say(f"Looking for {config.name} in the Hugging Face hub's cache, else in the hub.")
    # Without a network it warns twice of each of several tries; one sentence at the end is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(config.name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the dataset {config.name} cannot be had from the Hugging Face hub "
            f"({first_line(error)}); where there is no network, download its parquet files "
            "elsewhere and name their folder by --data.path."
        ) from error
    contents = {name: f"{config.name} {rows._fingerprint}" for name, rows in loaded.items()}
    return hub_tables(datasets, loaded, config, contents)


def parquet(datasets: Any, root: Path, config: DataConfig) -> dict[str, Table]:
    """Files `train*.parquet`, `validation*.parquet`, `test*.parquet` in a folder, with or without
    the hub's schema."""
    if not list(root.glob("*.parquet")) and (root / "data").is_dir():
        root = root / "data"
    files = {split: sorted(root.glob(f"{name}*.parquet")) for split, (name, *_) in SPLITS.items()}
    files = {split: of_split for split, of_split in files.items() if of_split}
    if "train" not in files:
        raise UserError(f"{root} has no train*.parquet; put the dataset's parquet files there.")
    names = {split: list(map(str, of_split)) for split, of_split in files.items()}
    try:
        contents = {split: hash_files(of_split) for split, of_split in files.items()}
        # It takes files of one name, size and time for the same, whatever they hold.
        folder = str(cache_folder(config) / "parquet" / hash_json(contents)[:16])
        loaded = datasets.load_dataset("parquet", data_files=names, cache_dir=folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the parquet files in {root} cannot be read "
            f"({first_line(error.__cause__ or error)}); fetch them again."
        ) from error
    return hub_tables(datasets, loaded, config, contents)


def hub_tables(
    datasets: Any, loaded: Any, config: DataConfig, contents: Mapping[str, str]
) -> dict[str, Table]:
    """The splits of a `datasets.DatasetDict`, `contents` changing when a split's pictures do."""
    features = next(iter(loaded.values())).features
    images = [name for name, feature in features.items() if holds_images(feature, datasets.Image)]
    columns = choose_columns(config, features, images, datasets.ClassLabel)
    image = columns.image
    tables = {}
    for split, name in find_splits(loaded.__contains__).items():
        rows = loaded[name]
        classes = None if columns.label is None else list(rows[columns.label])
        encoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        tables[split] = column_table(name, encoded, columns, classes, contents[name])
    return tables


def tfds(config: DataConfig) -> dict[str, Table]:
    """`tfds:NAME`, prepared already as array_record, in `--data.path` or TFDS's own folder."""
    tf_datasets = import_package("tensorflow-datasets", config)
    name = config.name.removeprefix("tfds:")
    given = None if config.path is None else Path(config.path)
    try:
        if given is not None and (given / "dataset_info.json").exists():
            builder = tf_datasets.builder_from_directory(str(given))
        else:
            builder = tf_datasets.builder(name, data_dir=given, file_format="array_record")
        if not builder.info.splits:
            raise ValueError("it is known, but not prepared")
        features = dict(builder.info.features.items())
        image_kind = tf_datasets.features.Image
        images = [name for name, feature in features.items() if isinstance(feature, image_kind)]
        encoded = {name: tf_datasets.decode.SkipDecoding() for name in images}
        sources = {
            split: builder.as_data_source(name, decoders=encoded)
            for split, name in find_splits(builder.info.splits.__contains__).items()
        }
    except Exception as error:
        raise UserError(
            f"TensorFlow Datasets has no '{name}' prepared in {given or '~/tensorflow_datasets'} "
            f"({first_line(error)}); prepare it with `tfds build {name} "
            "--file_format=array_record` and name its folder by --data.path."
        ) from error
    columns = choose_columns(config, features, images, tf_datasets.features.ClassLabel)
    content = hash_files(sorted(Path(builder.data_dir).glob("*.array_record*")))
    tables = {}
    for split, rows in sources.items():
        label = columns.label
        classes = None if label is None else [rows[i][label] for i in range(len(rows))]
        tables[split] = column_table(split, rows, columns, classes, f"{split} {content}")
    return tables
