"""Where encoded pictures come from: folders, parquet files, the Hugging Face hub, TensorFlow
Datasets. Each function returns tables: by split, a reader and what a person would call its
pictures, with the values of the class column."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from taming_jax.config.schema import DataConfig
from taming_jax.config.validation import flag
from taming_jax.data.images import Reader, cache_folder
from taming_jax.errors import UserError
from taming_jax.files import text_hash

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


class Table(NamedTuple):
    """One split. `classes` holds a value a picture (a number, a name), or is None where the data
    has no classes; `class_names` are the names of numbers, where the data has them; `content`
    changes when a picture does."""

    reader: Reader
    names: Sequence[str]
    classes: Sequence[Any] | None
    class_names: tuple[str, ...] | None
    content: str


def hashed(files: Iterable[Path]) -> str:
    """A hash of files' contents."""

    def one(file: Path) -> bytes:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "blake2b").digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(one, files))).hexdigest()


def existing(config: DataConfig, what: str) -> Path:
    """The folder that --data.path names."""
    if config.path is None:
        raise UserError(f"--data.name {config.name} needs --data.path, {what}.")
    if not Path(config.path).is_dir():
        raise UserError(f"--data.path {config.path} is no folder; name {what}.")
    return Path(config.path)


@dataclass(frozen=True)
class Files:
    """Pictures that are files of their own."""

    paths: list[Path]

    def __getitem__(self, number: int) -> bytes:
        return self.paths[number].read_bytes()


def folder(config: DataConfig, say: Callable[[str], None] = print) -> dict[str, Table]:
    """`train/CLASS/*` with or without `validation/` and `test/`, or `CLASS/*`, or pictures alone;
    classes are named by their folders. What belongs to no split or class is left out, and said."""
    root = existing(config, "the folder with your pictures")
    found = {
        split: root / name for split, names in SPLITS.items() for name in names
        if (root / name).is_dir()
    }  # fmt: skip
    left_out = []
    try:
        if "train" in found:
            left_out = [place for place in root.iterdir() if place not in found.values()]
        else:
            found = {"train": root}
        below_each = {split: sorted(pictures_below(place)) for split, place in found.items()}
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); give yourself the right to."
        ) from error
    tables = {}
    for split, place in found.items():
        files = below_each[split]
        if not files:
            kinds = " ".join(sorted(SUFFIXES))
            raise UserError(f"{place} holds no pictures ({kinds}); put some there.")
        below = [file.relative_to(place).parts for file in files]
        if any(len(parts) > 1 for parts in below):  # pictures beside the folders have no class
            left_out += [file for file, parts in zip(files, below, strict=True) if len(parts) < 2]
            files = [file for file, parts in zip(files, below, strict=True) if len(parts) > 1]
            classes: list[str] | None = [file.relative_to(place).parts[0] for file in files]
        else:
            classes = None
        names = [str(file.relative_to(root)) for file in files]
        try:
            content = hashed(files)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}); give yourself the right to."
            ) from error
        tables[split] = Table(Files(files), names, classes, None, content)
    left_out = [
        place for place in left_out
        if not place.name.startswith(".") and (place.is_dir() or is_picture(place))
    ]  # fmt: skip
    if left_out:
        which = "a split" if found["train"] != root else "a class"
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


def parquet(config: DataConfig) -> dict[str, Table]:
    """Files `train*.parquet`, `validation*.parquet`, `test*.parquet`, with or without the hub's
    schema, by `datasets`."""
    datasets = import_datasets(config)
    root = existing(config, "a folder with train*.parquet")
    if not list(root.glob("*.parquet")) and (root / "data").is_dir():
        root = root / "data"
    files = {
        split: sorted({file for name in names for file in root.glob(f"{name}*.parquet")})
        for split, names in SPLITS.items()
    }
    if not files["train"]:
        raise UserError(f"{root} has no train*.parquet; put the dataset's parquet files there.")
    files = {split: of_split for split, of_split in files.items() if of_split}
    names = {split: list(map(str, of_split)) for split, of_split in files.items()}
    try:
        contents = {split: hashed(of_split) for split, of_split in files.items()}
        # It takes files of one name, size and time for the same, whatever they hold.
        folder = str(cache_folder(config) / "parquet" / text_hash(contents)[:16])
        loaded = datasets.load_dataset("parquet", data_files=names, cache_dir=folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the parquet files {files['train'][0].name} … in {root} cannot be read "
            f"({first_line(error.__cause__ or error)}); fetch them again."
        ) from error
    return hub_tables(loaded, config, contents)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def columns(
    config: DataConfig, names: Sequence[str], images: Sequence[str], labels: Sequence[str]
) -> tuple[str, str | None]:
    """The columns of images and of classes: the settings, or the first of those that hold such by
    their kind, or are called so; None where there are no classes. UserError where there are no
    images, or no column of a setting's name."""
    has = f"its columns are {', '.join(names)}"
    for setting in ("image_column", "label_column"):
        wanted = getattr(config, setting)
        if wanted is not None and wanted not in names:
            raise UserError(
                f"the dataset has no column '{wanted}'; {has} ({flag('data', setting)})."
            )
    called = [name for name in ("label", "labels") if name in names]
    image = config.image_column or next(iter(images), None)
    if image is None:
        raise UserError(f"the dataset has no column of images; {has} (--data.image-column).")
    if image not in images:
        raise UserError(
            f"the column '{image}' holds no images; {', '.join(images) or 'no other'} does "
            "(--data.image-column)."
        )
    return image, config.label_column or next(iter([*labels, *called]), None)


@dataclass(frozen=True)
class HubColumn:
    """Pictures in a column of a Hugging Face dataset that is not decoded."""

    rows: Any
    column: str

    def __getitem__(self, number: int) -> bytes:
        value = self.rows[number][self.column]
        return value["bytes"] or Path(value["path"]).read_bytes()


def import_datasets(config: DataConfig) -> Any:
    """The package `datasets`, without its progress bars. UserError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data.name {config.name} needs the package datasets; pip install datasets."
        ) from error
    datasets.disable_progress_bars()
    return datasets


def hub(config: DataConfig) -> dict[str, Table]:
    """A dataset of the Hugging Face hub, by `datasets`."""
    datasets = import_datasets(config)
    print(
        f"Looking for {config.name} in the Hugging Face hub's cache, else in the hub.", flush=True
    )
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
    return hub_tables(loaded, config, contents)


def hub_tables(loaded: Any, config: DataConfig, contents: Mapping[str, str]) -> dict[str, Table]:
    """The splits of a `datasets.DatasetDict`, `contents` changing when a split's pictures do."""
    import datasets

    tables = {}
    for split, names in SPLITS.items():
        name = next((name for name in names if name in loaded), None)
        if name is None:
            continue
        rows = loaded[name]
        features = rows.features
        image, label = columns(
            config, list(features),
            [n for n, f in features.items() if holds_images(f, datasets.Image)],
            [n for n, f in features.items() if type(f) is datasets.ClassLabel],
        )  # fmt: skip
        known = getattr(features[label], "names", None) if label is not None else None
        encoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        tables[split] = Table(
            HubColumn(encoded, image), [f"{name}, row {i}" for i in range(len(rows))],
            None if label is None else list(rows[label]), tuple(known) if known else None,
            f"{image} {contents[name]}",  # another column holds other pictures
        )  # fmt: skip
    if "train" not in tables:
        raise UserError(
            f"the dataset {config.name} has no split 'train'; its splits are {', '.join(loaded)}."
        )
    return tables


def holds_images(feature: Any, image_kind: type) -> bool:
    """Whether a column holds pictures: by its kind, as bytes, or as the hub's structs of bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return type(feature) is image_kind or binary


@dataclass(frozen=True)
class TfdsImages:
    """Pictures of a TensorFlow Datasets source that is not decoded."""

    source: Any
    feature: str

    def __getitem__(self, number: int) -> bytes:
        return self.source[number][self.feature]


def tfds(config: DataConfig) -> dict[str, Table]:
    """`tfds:NAME`, prepared already as array_record, in `--data.path` or TFDS's own folder."""
    try:
        import tensorflow_datasets as tf_datasets
    except ImportError as error:
        raise UserError(
            f"--data.name {config.name} needs the package tensorflow-datasets; pip install it."
        ) from error
    name = config.name.removeprefix("tfds:")
    given = None if config.path is None else Path(config.path)
    try:
        if given is not None and (given / "dataset_info.json").exists():
            builder = tf_datasets.builder_from_directory(str(given))
        else:
            builder = tf_datasets.builder(name, data_dir=given, file_format="array_record")
        if not builder.info.splits:
            raise ValueError("it is known, but not prepared")
        features = builder.info.features
        image, label = columns(
            config, list(features),
            [n for n, f in features.items() if isinstance(f, tf_datasets.features.Image)],
            [n for n, f in features.items() if isinstance(f, tf_datasets.features.ClassLabel)],
        )  # fmt: skip
        skip = {image: tf_datasets.decode.SkipDecoding()}
        sources = {
            split: builder.as_data_source(name, decoders=skip)
            for split, names in SPLITS.items() for name in names if name in builder.info.splits
        }  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"TensorFlow Datasets has no '{name}' prepared in {given or '~/tensorflow_datasets'} "
            f"({first_line(error)}); prepare it with `tfds build {name} "
            "--file_format=array_record` and name its folder by --data.path."
        ) from error
    tables = {}
    content = hashed(sorted(Path(builder.data_dir).glob("*.array_record*")))
    for split, source in sources.items():
        classes = None if label is None else [source[i][label] for i in range(len(source))]
        known = features[label].names if label is not None else None
        tables[split] = Table(
            TfdsImages(source, image), [f"{split}, record {i}" for i in range(len(source))],
            classes, tuple(known) if known else None, f"{image} {split} {content}",
        )  # fmt: skip
    if "train" not in tables:
        raise UserError(f"the dataset {config.name} has no split 'train'.")
    return tables
