"""Finds the images in a folder, and which of its folders are splits and classes.

Every file is accounted for: it is an image of a split, or a message counts it as left out.
"""

import csv
import json
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from taming_jax.data.columns import Columns, choose_label, say_columns
from taming_jax.errors import UserError, say

# Suffixes of image files. Pillow cannot open some of them unless a plugin is registered.
SUFFIXES = {
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif",
    ".tiff", ".webp",
}  # fmt: skip
SPLITS = {
    split: re.compile(f"(partial-)?({names})([ _-]?(set|images|data))?", re.IGNORECASE)
    for split, names in {
        "train": "train|training", "validation": "val|valid|validation", "test": "test|testing",
    }.items()
}  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl")  # the Hugging Face hub's names for tables of files

Layout = Literal["auto", "splits", "classes"]
LeftOut = dict[str, list[Path]]


class Images(NamedTuple):
    """The image files of a split, and one class per file, or None if there are no classes."""

    files: list[Path]
    classes: list[Any] | None


def get_split(name: str) -> str | None:
    """Returns the split that a folder or file is named after, ignoring case, or None. Such names
    include "Test", "training_set" and "partial-train" (the hub's name for a part of a large
    split)."""
    return next((split for split, names in SPLITS.items() if names.fullmatch(name)), None)


def to_text(path: Path | str) -> str:
    """Returns a path as text, in which bytes that are not UTF-8 are escapes such as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_images(root: Path, layout: Layout, label_column: str | None) -> dict[str, Images]:
    """Returns the images of each split in a folder.

    `layout` is as in `DataConfig.layout`. `label_column` is the column of classes in a file
    `metadata.csv` or `metadata.jsonl` beside the images. Raises UserError if there are no images,
    and OSError if a folder cannot be read.
    """
    outside: list[Path] = []
    folders = choose_split_folders(root, layout, outside)
    finder = ImageFinder(list(folders.values()))
    finder.left_out["files and folders outside those that are read"] += outside
    if label_column and not any(map(find_table, folders.values())):
        raise UserError(
            f"there is no {METADATA[0]} or {METADATA[1]} in {to_text(root)} for "
            f"--data.label-column {label_column}; add one, or leave the setting out."
        )
    order = [split for split in ("train", "test", "validation") if split in folders]
    splits = {split: finder.find(folders[split]) for split in order}
    images = {
        split: assign_classes(files, folders[split], label_column, finder.left_out)
        for split, files in splits.items()
    }
    say_left_out(root, finder.left_out)
    if not splits["train"]:
        suffixes = " ".join(sorted(finder.suffixes))
        raise UserError(
            f"{folders['train']} holds no pictures ({suffixes}) and no parquet files; put some "
            "there."
        )
    return {split: part for split, part in images.items() if part.files}


def say_left_out(root: Path, left_out: LeftOut) -> None:
    """Says how many files and folders in `root` are left out, by reason, with an example."""
    reasons = [
        f"{reason} ({len(paths)}, such as {to_text(min(paths).relative_to(root))})"
        for reason, paths in left_out.items()
        if paths
    ]
    if reasons:
        say(f"Left out of {to_text(root)}: {'; '.join(reasons)}.")


def choose_split_folders(root: Path, layout: Layout, outside: list[Path]) -> dict[str, Path]:
    """Returns the folder of each split, or `root` as that of the training split if its folders are
    classes. Says how it reads a layout that has two readings. Adds the files and folders that this
    leaves out to `outside`."""
    if layout == "classes":
        return {"train": root}
    children = sorted(root.iterdir())
    folders = list(filter(has_images, list_folders(root)))
    splits: dict[str, Path] = {}
    for path in folders:
        split = get_split(path.name)
        if split in splits:
            raise UserError(
                f"{splits[split]} and {path} are both the {split} split; rename one of them, or "
                "read them as classes with --data.layout classes."
            )
        if split:
            splits[split] = path
    others = [path for path in folders if path not in splits.values()]
    if "train" in splits and (
        layout == "splits" or not others or any(map(has_images, list_folders(splits["train"])))
    ):
        outside += [path for path in children if path not in splits.values()]
        if others:
            say(
                f"Splits in {to_text(root)}: {list_names(splits.values())}. Left out: "
                f"{list_names(others)}; --data.layout classes reads all of them as classes."
            )
        return {split: skip_single_folders(path, outside) for split, path in splits.items()}
    inner = skip_single_folders(root, outside)
    if inner != root:
        return choose_split_folders(inner, layout, outside)
    if layout == "splits":
        raise UserError(f"{root} has no folder 'train' with pictures; add one.")
    if named := [path for path in folders if any(map(get_split, re.split(r"[-_ .]", path.name)))]:
        advice = (
            "--data.layout splits reads those named after splits as splits"
            if "train" in splits
            else "if they are splits, rename them to train, validation and test"
        )
        say(f"These folders in {to_text(root)} are read as classes: {list_names(named)}; {advice}.")
    return {"train": root}


def skip_single_folders(root: Path, outside: list[Path]) -> Path:
    """Returns `root`, or the only folder in it if all images are in folders of that one, and
    applies this rule again to that folder.
    Says which folder is read instead, and adds the other files in `root` to `outside`."""
    finder = ImageFinder([root])
    folders = list(filter(has_images, list_folders(root)))
    if len(folders) != 1 or any(map(finder.is_image, [*root.iterdir(), *folders[0].iterdir()])):
        return root
    say(
        f"{to_text(folders[0])} is the only folder with pictures in {to_text(root)}, so the "
        "folders in it are read. Read those in --data.path as classes with --data.layout classes."
    )
    outside += [path for path in sorted(root.iterdir()) if path != folders[0]]
    return skip_single_folders(folders[0], outside)


def list_folders(root: Path) -> list[Path]:
    """Returns the folders in a folder that are not hidden, sorted."""
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path)]


def is_hidden(path: Path) -> bool:
    """Returns whether a path is hidden, or the folder that macOS adds to zip files."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def list_names(paths: Iterable[Path]) -> str:
    """Returns the first ten names of files or folders, as text."""
    names = [to_text(path.name) for path in paths]
    return ", ".join([*names[:10], *["…"] * (len(names) > 10)])


def find_table(folder: Path) -> Path | None:
    """Returns the table of the images in a folder, if there is one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def assign_classes(
    files: list[Path], folder: Path, label_column: str | None, left_out: LeftOut
) -> Images:
    """Returns the images of a split with their classes.

    The classes are the names of the folders in `folder`. If there are fewer than two, or
    `label_column` is set, they come from a table of the files in `folder`, if it has one. Adds
    images without a folder to `left_out` if others have one.
    """
    table = find_table(folder)
    names = [file.relative_to(folder).parts for file in files]
    if table and (label_column or len({parts[0] for parts in names if len(parts) > 1}) < 2):
        left_out[f"files of type {table.suffix}"].remove(table)
        return Images(
            files, read_metadata(table, ["/".join(parts) for parts in names], label_column)
        )
    if all(len(parts) == 1 for parts in names):
        return Images(files, None)
    left_out["pictures outside the class folders"] += [
        file for file in files if file.parent == folder
    ]
    in_folders = [file for file in files if file.parent != folder]
    return Images(in_folders, [to_text(file.relative_to(folder).parts[0]) for file in in_folders])


def read_metadata(table: Path, files: list[str], label_column: str | None) -> list[Any] | None:
    """Returns the classes of files according to a table with a column `file_name`: None for a file
    that is not in the table, or None if the table has no classes. Raises UserError if the table is
    damaged."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            if table.suffix == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(lines))
            else:
                rows = [dict(json.loads(line)) for line in lines if line.strip()]
        if not rows:
            raise ValueError("it is empty")
        by_name = {posixpath.normpath(row["file_name"]): row for row in rows}
    except (KeyError, AttributeError, TypeError, ValueError, csv.Error) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(
            f"{to_text(table)} is not a table with a column 'file_name' ({reason}); fix or remove "
            "it."
        ) from error
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if name]
    columns.remove("file_name")
    label = choose_label(
        label_column, columns, texts=columns, read=lambda name: [row.get(name) for row in rows]
    )
    say_columns(to_text(table), Columns("file_name", label, ()), columns)
    missing = len(set(files) - by_name.keys()), len(by_name.keys() - set(files))
    if any(missing):
        say(
            f"{to_text(table)}: pictures without a row: {missing[0]}; rows without a picture: "
            f"{missing[1]}."
        )
    return [by_name.get(name, {}).get(label) for name in files] if label else None


def has_images(folder: Path) -> bool:
    """Returns whether there are images in a folder or its folders."""
    return any(True for _ in ImageFinder([folder]).walk(folder))


class ImageFinder:
    """Finds image files, each once, and records other files in `left_out`, by reason.

    Links to files are followed. Links to folders are followed if they lead away from `roots`, the
    folders that are read; links to folders below such a link are not, so that every search ends.
    """

    def __init__(self, roots: Sequence[Path], suffixes: Collection[str] = ()):
        """`suffixes` are those of the files to find. Default: those in SUFFIXES that Pillow can
        open."""
        Image.init()
        formats = Image.registered_extensions()
        images = {suffix for suffix in SUFFIXES if formats.get(suffix) in Image.OPEN}
        self.suffixes, self._unreadable = set(suffixes) or images, SUFFIXES - images
        self.roots = [root.resolve() for root in roots]
        self._seen: set[tuple[int, int]] = set()
        self.left_out: LeftOut = defaultdict(list)

    def find(self, folder: Path) -> list[Path]:
        """Returns the image files in a folder and its folders, sorted. Raises OSError if a folder
        cannot be read."""
        files = []
        for file in sorted(self.walk(folder)):
            status = file.stat()
            if (status.st_dev, status.st_ino) in self._seen:
                self.left_out["other names of pictures already counted"].append(file)
            else:
                self._seen.add((status.st_dev, status.st_ino))
                files.append(file)
        return files

    def is_image(self, path: Path) -> bool:
        """Returns whether a path is a file with the suffix of an image that Pillow can open."""
        is_image = path.suffix.lower() in self.suffixes and path.is_file()
        return is_image and not is_hidden(path)

    def walk(self, folder: Path, by_link: bool = False) -> Iterator[Path]:
        """Yields the image files in a folder and its folders. `by_link` is true below a link."""
        for path in folder.iterdir():
            suffix = path.suffix.lower()
            if is_hidden(path):
                self.left_out["hidden files and folders"].append(path)
            elif path.is_dir():
                is_link = path.is_symlink()
                if is_link and (by_link or self._is_read(path.resolve())):
                    self.left_out["links to folders"].append(path)
                else:
                    yield from self.walk(path, by_link or is_link)
            elif self.is_image(path):
                yield path
            elif not path.is_file():
                self.left_out["broken links and special files"].append(path)
            elif suffix in self._unreadable:
                self.left_out[f"files of type {suffix}, which Pillow cannot open"].append(path)
            else:
                self.left_out[
                    f"files of type {suffix}" if suffix else "files without a suffix"
                ].append(path)

    def _is_read(self, folder: Path) -> bool:
        return any(
            folder.is_relative_to(root) or root.is_relative_to(folder) for root in self.roots
        )
