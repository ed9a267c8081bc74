"""Where encoded pictures come from: folders, parquet files, the Hugging Face hub, TensorFlow
Datasets. Each function returns tables: by split, a reader and what a person would call its
pictures, with the values of the class column."""

import bisect
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from taming_jax.config.schema import DataConfig
from taming_jax.config.validation import flag
from taming_jax.data.images import Reader
from taming_jax.errors import UserError

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


@dataclass(frozen=True)
class ParquetColumn:
    """Pictures in a column of parquet files: bytes, or the hub's struct of bytes and path."""

    files: list[Path]
    column: str
    groups: list[tuple[int, int, int]]  # of every row group: file, number, rows before it

    def __getitem__(self, number: int) -> bytes:
        at = bisect.bisect_right(self.groups, number, key=lambda group: group[2]) - 1
        file, group, before = self.groups[at]
        rows = read_group(str(self.files[file]), group, self.column)
        value = rows[number - before].as_py()
        value = value["bytes"] if isinstance(value, dict) else value
        if value is None:
            raise ValueError("no bytes")
        return value


@functools.lru_cache(maxsize=4)
def read_group(file: str, group: int, column: str) -> Any:
    """A row group of a column. A few are kept, since neighbours are read together."""
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(file).read_row_group(group, columns=[column]).column(0)


def parquet(config: DataConfig) -> dict[str, Table]:
    """Files `train*.parquet`, `validation*.parquet`, `test*.parquet` with the hub's schema."""
    import pyarrow
    import pyarrow.parquet as pq

    root = existing(config, "a folder with train*.parquet")
    if not list(root.glob("*.parquet")) and (root / "data").is_dir():
        root = root / "data"
    tables = {}
    for split, prefixes in SPLITS.items():
        files = sorted({file for name in prefixes for file in root.glob(f"{name}*.parquet")})
        if not files:
            continue
        try:
            opened = [pq.ParquetFile(file) for file in files]
            schema = opened[0].schema_arrow
            features = described(schema)
            kinds = {name: features.get(name, {}).get("_type") for name in schema.names}
            image, label = columns(
                config, schema.names,
                [n for n in kinds if kinds[n] == "Image" or holds_bytes(schema.field(n).type)],
                [n for n in kinds if kinds[n] == "ClassLabel"],
            )  # fmt: skip
            classes = names = None
            for name, file in zip(files, opened, strict=True):
                if not {image, label} - {None} <= set(file.schema_arrow.names):
                    raise UserError(
                        f"{name} has other columns than {files[0].name}: "
                        f"{', '.join(file.schema_arrow.names)}; fetch them again."
                    )
            if label is not None:
                read = [file.read(columns=[label]).column(0).to_pylist() for file in opened]
                classes = [value for values in read for value in values]
                names = features.get(label, {}).get("names")
            groups, before = [], 0
            for i, file in enumerate(opened):
                for group in range(file.metadata.num_row_groups):
                    groups.append((i, group, before))
                    before += file.metadata.row_group(group).num_rows
            content = hashed(files)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"the parquet files {files[0].name} … in {root} cannot be read ({error}); fetch "
                "them again."
            ) from error
        rows = [f"{split}*.parquet, row {i}" for i in range(before)]
        reader = ParquetColumn(files, image, groups)
        content = f"{image} {content}"  # another column holds other pictures
        tables[split] = Table(reader, rows, classes, tuple(names) if names else None, content)
    if "train" not in tables:
        raise UserError(f"{root} has no train*.parquet; put the dataset's parquet files there.")
    return tables


def described(schema: Any) -> dict[str, Any]:
    """What the hub's metadata of a parquet file says of its columns."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}


def holds_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


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


def hub(config: DataConfig) -> dict[str, Table]:
    """A dataset of the Hugging Face hub, or of a local folder, by `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data.name {config.name} needs the package datasets; pip install datasets, or name "
            "a folder with its parquet files by --data.path."
        ) from error
    print(
        f"Looking for {config.name} in the Hugging Face hub's cache, else in the hub.", flush=True
    )
    # Without a network it warns twice of each of several tries; one sentence at the end is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(config.name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the dataset {config.name} cannot be had from the Hugging Face hub ({reason}); where "
            "there is no network, download its parquet files elsewhere and name their folder by "
            "--data.path."
        ) from error
    tables = {}
    for split, names in SPLITS.items():
        name = next((name for name in names if name in loaded), None)
        if name is None:
            continue
        rows = loaded[name]
        features = rows.features
        image, label = columns(
            config, list(features),
            [n for n, f in features.items()
             if type(f) is datasets.Image or getattr(f, "dtype", None) == "binary"],
            [n for n, f in features.items() if type(f) is datasets.ClassLabel],
        )  # fmt: skip
        known = getattr(features[label], "names", None) if label is not None else None
        tables[split] = Table(
            HubColumn(
                rows.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image
            ),
            [f"{name}, row {i}" for i in range(len(rows))],
            None if label is None else list(rows[label]),
            tuple(known) if known else None,
            f"{image} {config.name} {rows._fingerprint}",
        )
    if "train" not in tables:
        raise UserError(
            f"the dataset {config.name} has no split 'train'; its splits are {', '.join(loaded)}."
        )
    return tables


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"TensorFlow Datasets has no '{name}' prepared in {given or '~/tensorflow_datasets'} "
            f"({reason}); prepare it with `tfds build {name} --file_format=array_record` and name "
            "its folder by --data.path."
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
