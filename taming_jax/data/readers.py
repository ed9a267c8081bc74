"""Readers of encoded images from folders, parquet files, the Hugging Face hub and TensorFlow
Datasets. Each reader returns a table for every split that exists, with the keys "train",
"validation" and "test"."""

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
from taming_jax.data.images import Table, get_cache_folder
from taming_jax.errors import UserError, say
from taming_jax.storage import hash_json

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
# The names that each split may have. The first is a prefix of the others.
SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}


def find_splits(exists: Callable[[str], bool]) -> dict[str, str]:
    """Returns the name of each split that exists, with the keys "train", "validation", "test"."""
    return {split: name for split, names in SPLITS.items() for name in names if exists(name)}


def hash_files(files: Iterable[Path]) -> str:
    """Returns a hash of the contents of files."""

    def hash_file(file: Path) -> bytes:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "blake2b").digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(hash_file, files))).hexdigest()


@dataclass(frozen=True)
class Files:
    """Encoded images, one per file."""

    paths: list[Path]

    def __getitem__(self, number: int) -> bytes:
        return self.paths[number].read_bytes()


def read_folder(config: DataConfig) -> dict[str, Table]:
    """Reads image files from the folder `config.path`.

    The folder holds `train/CLASS/*`, optionally with `validation/` and `test/`; or `CLASS/*`; or
    only image files. The class folders name the classes. Files outside the split and class folders
    are left out with a message. Raises UserError if there are no images or files cannot be read.
    """
    if config.path is None:
        raise UserError("--data.name folder needs --data.path, the folder with your pictures.")
    try:
        return build_folder_tables(Path(config.path))
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); check its permissions."
        ) from error


def build_folder_tables(root: Path) -> dict[str, Table]:
    """Builds one table per split from a folder, as `read_folder` describes. Raises UserError if a
    split has no images, and OSError if files cannot be read."""
    splits = find_splits(lambda name: (root / name).is_dir())
    folders = {split: root / name for split, name in splits.items()}
    if "train" in folders:
        left_out = [path for path in root.iterdir() if path not in folders.values()]
    else:
        folders, left_out = {"train": root}, []
    tables = {}
    for split, folder in folders.items():
        files = sorted(find_image_files(folder))
        if not files:
            suffixes = " ".join(sorted(SUFFIXES))
            raise UserError(f"{folder} holds no pictures ({suffixes}); put some there.")
        in_classes = [file for file in files if file.parent != folder]
        if in_classes:  # images outside the class folders have no class
            left_out += [file for file in files if file.parent == folder]
            files = in_classes
        classes = [file.relative_to(folder).parts[0] for file in in_classes] or None
        names = [str(file.relative_to(root)) for file in files]
        tables[split] = Table(Files(files), names, classes, (), hash_files(files))
    left_out = [
        path for path in left_out
        if not path.name.startswith(".") and (path.is_dir() or is_image_file(path))
    ]  # fmt: skip
    if left_out:
        kind = "class" if root in folders.values() else "split or class"
        say(
            f"Paths outside the {kind} folders are left out ({len(left_out)} in total, such as "
            f"{left_out[0]})."
        )
    return tables


def find_image_files(root: Path) -> Iterator[Path]:
    """Yields the image files in a folder and, recursively, in its subfolders.

    Links are followed, and hidden files and folders are skipped. Raises OSError if a folder cannot
    be read.
    """

    def raise_error(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=raise_error, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from filter(is_image_file, (Path(folder, name) for name in names))


def is_image_file(file: Path) -> bool:
    """Returns whether a path is an image file, by its suffix, and not hidden."""
    hidden = file.name.startswith(".")
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


@dataclass(frozen=True)
class Column:
    """Encoded images in a column of a dataset's rows: bytes, or the hub's structs with bytes or a
    path."""

    rows: Any
    column: str

    def __getitem__(self, number: int) -> bytes:
        value = self.rows[number][self.column]
        if isinstance(value, dict):
            value = value["bytes"] or Path(value["path"]).read_bytes()
        return value


class Columns(NamedTuple):
    """The columns of a table of rows.

    `label` is None if there are no classes. `class_names` is empty unless classes are numbers with
    names.
    """

    image: str
    label: str | None
    class_names: tuple[str, ...]


def build_column_table(
    split: str, rows: Any, columns: Columns, classes: Sequence[Any] | None, content: str
) -> Table:
    """Builds a table from rows with encoded images. `content` changes when an image changes."""
    names = [f"{split}, row {i}" for i in range(len(rows))]
    reader = Column(rows, columns.image)
    return Table(reader, names, classes, columns.class_names, f"{columns.image} {content}")


def choose_columns(
    config: DataConfig, features: Mapping[str, Any], images: Sequence[str], label_kind: type
) -> Columns:
    """Returns the columns of images and classes that the settings name.

    By default, they are the first of the columns `images`, and the first column of type
    `label_kind` or, without one, the column "label" or "labels". Raises UserError if no column
    holds images, or a column that a setting names does not exist.
    """
    names = list(features)
    if not images:
        raise UserError(
            f"the dataset has no column of images, only {', '.join(names)}; choose another dataset."
        )
    image = config.image_column or images[0]
    if image not in images:
        raise UserError(
            f"the dataset has no column '{image}' that holds images; set --data.image-column to "
            f"one of these: {', '.join(images)}."
        )
    labels = [name for name in names if isinstance(features[name], label_kind)]
    labels += [name for name in ("label", "labels") if name in names]
    label = config.label_column or next(iter(labels), None)
    if label is None:
        return Columns(image, None, ())
    if label not in names:
        raise UserError(
            f"the dataset has no column '{label}'; set --data.label-column to one of these: "
            f"{', '.join(names)}."
        )
    return Columns(image, label, tuple(getattr(features[label], "names", None) or ()))


def holds_images(feature: Any, image_kind: type) -> bool:
    """Returns whether a column holds images, bytes, or the hub's structs with bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, image_kind) or binary


def import_package(name: str, config: DataConfig) -> Any:
    """Imports a package that only some datasets need. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        raise UserError(
            f"--data.name {config.name} needs the package {name}; run `pip install {name}`."
        ) from error


def get_first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_hub(config: DataConfig) -> dict[str, Table]:
    """Reads a dataset from the Hugging Face hub, or its parquet files from `config.path`.

    Raises UserError if the dataset cannot be loaded.
    """
    datasets = import_package("datasets", config)
    datasets.disable_progress_bars()
    if config.path is not None:
        return read_parquet(datasets, Path(config.path), config)
    say(f"Loading {config.name} from the Hugging Face hub or its local cache.")
    # Without a network, its client logs two warnings per retry. The error message below is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(config.name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the dataset {config.name} cannot be loaded from the Hugging Face hub "
            f"({get_first_line(error)}); check its name and your network, or download its parquet "
            "files elsewhere and name their folder with --data.path."
        ) from error
    contents = {name: f"{config.name} {rows._fingerprint}" for name, rows in loaded.items()}
    return build_hub_tables(datasets, loaded, config, contents)


def read_parquet(datasets: Any, root: Path, config: DataConfig) -> dict[str, Table]:
    """Reads the files `train*.parquet`, `validation*.parquet` and `test*.parquet` in a folder, with
    or without the hub's schema. Raises UserError if no file is for training or one is damaged.
    """
    if not list(root.glob("*.parquet")) and (root / "data").is_dir():
        root = root / "data"
    files = {split: sorted(root.glob(f"{name}*.parquet")) for split, (name, *_) in SPLITS.items()}
    files = {split: paths for split, paths in files.items() if paths}
    if "train" not in files:
        raise UserError(
            f"{root} has no train*.parquet; put the dataset's parquet files there, or set "
            "--data.name folder to read a folder of pictures."
        )
    data_files = {split: list(map(str, paths)) for split, paths in files.items()}
    try:
        contents = {split: hash_files(paths) for split, paths in files.items()}
        # `datasets` identifies cached files by name, size and time only, so the folder is named by
        # a hash of their contents.
        folder = str(get_cache_folder(config) / "parquet" / hash_json(contents)[:16])
        loaded = datasets.load_dataset("parquet", data_files=data_files, cache_dir=folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the parquet files in {root} cannot be read "
            f"({get_first_line(error.__cause__ or error)}); download them again."
        ) from error
    return build_hub_tables(datasets, loaded, config, contents)


def build_hub_tables(
    datasets: Any, loaded: Any, config: DataConfig, contents: Mapping[str, str]
) -> dict[str, Table]:
    """Builds one table per split of a `datasets.DatasetDict`. `contents` maps the name of a split
    to a string that changes when its images change."""
    features = next(iter(loaded.values())).features
    images = [name for name, feature in features.items() if holds_images(feature, datasets.Image)]
    columns = choose_columns(config, features, images, datasets.ClassLabel)
    image = columns.image
    tables = {}
    for split, name in find_splits(loaded.__contains__).items():
        rows = loaded[name]
        classes = None if columns.label is None else list(rows[columns.label])
        encoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        tables[split] = build_column_table(name, encoded, columns, classes, contents[name])
    return tables


def read_tfds(config: DataConfig) -> dict[str, Table]:
    """Reads a dataset `tfds:NAME` from TensorFlow Datasets, prepared as array_record.

    It is read from `config.path`, by default from TensorFlow Datasets' own folder. Raises UserError
    if it cannot be read.
    """
    tf_datasets = import_package("tensorflow-datasets", config)
    name = config.name.removeprefix("tfds:")
    path = None if config.path is None else Path(config.path)
    try:
        if path is not None and (path / "dataset_info.json").exists():
            builder = tf_datasets.builder_from_directory(str(path))
        else:
            builder = tf_datasets.builder(name, data_dir=path, file_format="array_record")
        if not builder.info.splits:
            raise ValueError("it is known but not prepared")
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
            f"TensorFlow Datasets has no '{name}' prepared in {path or '~/tensorflow_datasets'} "
            f"({get_first_line(error)}); prepare it with `tfds build {name} "
            "--file_format=array_record` and name its folder with --data.path."
        ) from error
    columns = choose_columns(config, features, images, tf_datasets.features.ClassLabel)
    content = hash_files(sorted(Path(builder.data_dir).glob("*.array_record*")))
    tables = {}
    for split, rows in sources.items():
        label = columns.label
        classes = None if label is None else [rows[i][label] for i in range(len(rows))]
        tables[split] = build_column_table(split, rows, columns, classes, f"{split} {content}")
    return tables
