"""Readers of encoded images from folders, parquet files, the Hugging Face hub and TensorFlow
Datasets. Each reader returns a table for every split that exists, with the keys "train",
"validation" and "test"."""

import glob
import hashlib
import importlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taming_jax.config.schema import DataConfig
from taming_jax.data.columns import Columns, choose_columns, say_columns
from taming_jax.data.folders import (
    ImageFinder,
    find_images,
    get_split,
    has_images,
    say_left_out,
    to_text,
)
from taming_jax.data.images import Table, get_cache_folder
from taming_jax.errors import UserError, say
from taming_jax.storage import hash_json


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


def read_path(config: DataConfig) -> dict[str, Table]:
    """Reads a dataset from the folder `config.path`.

    The folder holds a dataset that `save_to_disk` of the package datasets wrote, or image files
    (see `folders.find_images`), or parquet files (see `read_parquet`). If it holds images and
    parquet files, `config.name` determines which are read. Raises UserError if there are none or
    the files cannot be read."""
    if config.path is None:
        raise UserError("--data.name folder needs --data.path, the folder with your pictures.")
    root = Path(config.path)
    try:
        arrows = {"state.json": "*.arrow", "dataset_dict.json": "*/*.arrow"}
        if any((root / name).is_file() and any(root.glob(arrows[name])) for name in arrows):
            return read_saved(root, config)
        finder = ImageFinder([root], [".parquet"])
        files = finder.find(root)
        if files and (config.name != "folder" or not has_images(root)):
            say_left_out(root, finder.left_out)
            return read_parquet(root, files, config)
        return read_images(root, config)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); check its permissions."
        ) from error


def read_images(root: Path, config: DataConfig) -> dict[str, Table]:
    """Builds one table per split from a folder of images. Raises OSError."""
    tables = {}
    for split, (files, classes) in find_images(root, config.layout, config.label_column).items():
        names = [to_text(file.relative_to(root)) for file in files]
        tables[split] = Table(Files(files), names, classes, (), hash_files(files))
    return tables


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


def build_column_table(
    split: str, rows: Any, columns: Columns, classes: Sequence[Any] | None, content: str
) -> Table:
    """Builds a table from rows with encoded images. `content` changes when an image changes."""
    names = [f"{split}, row {i}" for i in range(len(rows))]
    reader = Column(rows, columns.image)
    return Table(reader, names, classes, columns.class_names, f"{columns.image} {content}")


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
    """Reads a dataset from the Hugging Face hub, or its files in `config.path`.

    Raises UserError if the dataset cannot be loaded.
    """
    if config.path is not None:
        return read_path(config)
    datasets = import_datasets(config)
    say(f"Loading {config.name} from the Hugging Face hub or its local cache.")
    # Without a network, its client logs two warnings per retry. The error message below is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(config.name, config.config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            reason = " ".join(str(error).split())
            raise UserError(f"set --data.config for {config.name}: {reason}") from error
        raise UserError(
            f"the dataset {config.name} cannot be loaded from the Hugging Face hub "
            f"({get_first_line(error)}); check its name and your network, or download its parquet "
            "files elsewhere and name their folder with --data.path."
        ) from error
    contents = {name: f"{config.name} {rows._fingerprint}" for name, rows in loaded.items()}
    return build_hub_tables(datasets, loaded, config, contents)


def import_datasets(config: DataConfig) -> Any:
    """Imports the package datasets, without its progress bars."""
    datasets = import_package("datasets", config)
    datasets.disable_progress_bars()
    return datasets


def read_saved(root: Path, config: DataConfig) -> dict[str, Table]:
    """Reads a dataset that `datasets` has saved with `save_to_disk`. Raises UserError if it cannot
    be read."""
    datasets = import_datasets(config)
    try:
        loaded = datasets.load_from_disk(str(root))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the saved dataset in {root} cannot be read ({get_first_line(error)}); save it again."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    content = hash_files(sorted(root.rglob("*.arrow")))
    contents = {name: f"{name} {content}" for name in loaded}
    return build_hub_tables(datasets, loaded, config, contents)


def find_parquet_splits(
    root: Path, files: Sequence[Path], config: str | None
) -> dict[str, list[Path]]:
    """Returns the parquet files of each split of a configuration.

    Files or their folders are named after splits, as in `train-00000-of-00001.parquet` and
    `plain_text/train/0000.parquet`; other folders, except `data`, and words before the split in a
    file's name are configurations, of which `config` names one. If there are no splits, all files
    are the training split. Raises UserError if `config` does not name one of several
    configurations."""
    configs: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        *folders, name = file.relative_to(root).with_suffix("").parts
        words = re.split(r"[-_.]", name)
        numbers = [i for i, word in enumerate(words) if get_split(word)]
        places = [*folders, *(words[i] for i in numbers[:1])]
        split = next(filter(None, map(get_split, reversed(places))), "")
        parts = [part for part in folders if part != "data" and not get_split(part)]
        parts += words[: numbers[0]] if numbers else []
        configs["/".join(parts)][split].append(file)
    if config is None and len(configs) == 1:
        config = next(iter(configs))
    if config not in configs:
        names = ", ".join(f"'{name}'" for name in configs)
        raise UserError(f"set --data.config to one of the configurations in {root}: {names}.")
    splits = dict(configs[config])
    other = splits.pop("", [])
    if not splits:
        return {"train": other}
    if other:
        say(f"Left out: files that belong to no split ({len(other)}, such as {other[0]}).")
    return splits


def read_parquet(root: Path, files: Sequence[Path], config: DataConfig) -> dict[str, Table]:
    """Reads parquet files in a folder (see `find_parquet_splits`), with or without the hub's
    schema. Raises UserError if there are none to train on or one is damaged."""
    splits = find_parquet_splits(root, files, config.config)
    if "train" not in splits:
        raise UserError(
            f"{root} has no parquet files of a training split; put the dataset's files there."
        )
    datasets = import_datasets(config)
    names = {split: [glob.escape(str(path)) for path in paths] for split, paths in splits.items()}
    try:
        contents = {split: hash_files(paths) for split, paths in splits.items()}
        # `datasets` identifies cached files by name, size and time only, so the folder is named by
        # a hash of their contents.
        folder = str(get_cache_folder(config) / "parquet" / hash_json(contents)[:16])
        loaded = {  # one by one, since a test split may have other types
            split: datasets.load_dataset(
                "parquet", data_files={split: files}, split=split, cache_dir=folder
            )
            for split, files in names.items()
        }
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the parquet files in {root} cannot be read "
            f"({get_first_line(error.__cause__ or error)}); download them again."
        ) from error
    return build_hub_tables(datasets, loaded, config, contents)


def name_splits(names: Iterable[str]) -> dict[str, str]:
    """Returns the names of a source's splits, keyed by "train", "validation" and "test". Says which
    others are left out."""
    splits: dict[str, str] = {}
    other = []
    for name in names:
        split = get_split(name)
        if split and split not in splits:
            splits[split] = name
        else:
            other.append(name)
    if other:
        say(f"Splits that are left out: {', '.join(other)}.")
    return splits


def build_hub_tables(
    datasets: Any, loaded: Any, config: DataConfig, contents: Mapping[str, str]
) -> dict[str, Table]:
    """Builds one table per split of a `datasets.DatasetDict`. `contents` maps the name of a split
    to a string that changes when its images change."""
    splits = name_splits(loaded)
    rows = loaded[splits.get("train", next(iter(loaded)))]
    features = rows.features
    images = [name for name, feature in features.items() if holds_images(feature, datasets.Image)]
    images.sort(key=lambda name: not isinstance(features[name], datasets.Image))
    columns = choose_columns(config, features, images, datasets.ClassLabel, rows.__getitem__)
    say_columns(config.path or config.name, columns, features)
    image, label = columns.image, columns.label
    names = {
        split: tuple(getattr(loaded[name].features.get(label), "names", None) or ())
        for split, name in splits.items()
    }
    tables = {}
    for split, name in splits.items():
        rows = loaded[name]
        if image not in rows.column_names:
            say(f"{name} has no column '{image}' and is left out.")
            continue
        classes = list(rows[label]) if label in rows.column_names else None
        if classes and len(set(names.values())) > 1:  # numbers differ in meaning
            classes = [to_class_name(value, names[split]) for value in classes]
            columns = columns._replace(class_names=())
        encoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        tables[split] = build_column_table(name, encoded, columns, classes, contents[name])
    return tables


def to_class_name(value: Any, names: Sequence[str]) -> Any:
    """Returns the name of a class, given its number, or the value itself if it is not the number of
    a named class."""
    is_number = isinstance(value, int) and 0 <= value < len(names)
    return names[value] if is_number else value


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
            for split, name in name_splits(builder.info.splits).items()
        }
    except Exception as error:
        raise UserError(
            f"TensorFlow Datasets has no '{name}' prepared in {path or '~/tensorflow_datasets'} "
            f"({get_first_line(error)}); prepare it with `tfds build {name} "
            "--file_format=array_record` and name its folder with --data.path."
        ) from error
    columns = choose_columns(config, features, images, tf_datasets.features.ClassLabel)
    say_columns(config.name, columns, features)
    content = hash_files(sorted(Path(builder.data_dir).glob("*.array_record*")))
    tables = {}
    for split, rows in sources.items():
        label = columns.label
        classes = None if label is None else [rows[i][label] for i in range(len(rows))]
        tables[split] = build_column_table(split, rows, columns, classes, f"{split} {content}")
    return tables
