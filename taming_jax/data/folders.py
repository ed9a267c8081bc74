"""Finds the images in a folder, and which of its folders are splits and classes.

Every file is accounted for: it is an image of a split, or a message counts it as left out.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

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
METADATA = ("metadata.csv", "metadata.jsonl")  # as the Hugging Face hub calls tables of files

Layout = Literal["auto", "splits", "classes"]
LeftOut = dict[str, list[Path]]


class Images(NamedTuple):
    """The image files of a split, and one class per file, or None if there are no classes."""

    files: list[Path]
    classes: list[str | None] | None


def get_split(name: str) -> str | None:
    """Returns the split that a folder or file is named after, in any capitalization, if any:
    "Test", "training_set", or "partial-train" (the hub's name of a part of a large split)."""
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
    splits = {split: finder.find(folder) for split, folder in folders.items()}
    images = {
        split: assign_classes(files, folders[split], label_column, finder.left_out)
        for split, files in splits.items()
    }
    parts = [
        f"{reason} ({len(paths)}, such as {to_text(paths[0].relative_to(root))})"
        for reason, paths in finder.left_out.items()
        if paths
    ]
    if parts:
        say(f"Left out of {to_text(root)}: {'; '.join(parts)}.")
    for split, folder in folders.items():
        if not splits[split]:
            suffixes = " ".join(sorted(finder.suffixes))
            raise UserError(
                f"{folder} holds no pictures ({suffixes}) and no parquet files; put some there."
            )
    return images


def choose_split_folders(root: Path, layout: Layout, outside: list[Path]) -> dict[str, Path]:
    """Returns the folder of each split, or `root` as that of the training split if its folders are
    classes. Says how it reads a layout that has two readings. Adds the files and folders that this
    leaves out to `outside`."""
    if layout == "classes":
        return {"train": root}
    finder = ImageFinder([root])
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
                f"{list_names(splits.values())} in {root} are read as splits, and other folders "
                "are left out. Read all folders as classes with --data.layout classes."
            )
        return splits
    if layout == "splits":
        raise UserError(f"{root} has no folder 'train' with pictures; add one.")
    if len(folders) == 1 and not any(map(finder.is_image, [*children, *folders[0].iterdir()])):
        say(
            f"{folders[0].name} is the only folder in {root}, so the folders in it are read. Read "
            "it as a class with --data.layout classes."
        )
        outside += [path for path in children if path != folders[0]]
        return choose_split_folders(folders[0], layout, outside)
    if splits:
        say(
            f"All folders in {root} are read as classes, {list_names(splits.values())} too. Read "
            "those as splits with --data.layout splits."
        )
    return {"train": root}


def list_folders(root: Path) -> list[Path]:
    """Returns the folders in a folder that are not hidden, sorted."""
    return [
        path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")
    ]


def list_names(paths: Iterable[Path]) -> str:
    """Returns the names of some files or folders, as text."""
    return " and ".join(to_text(path.name) for path in paths)


def assign_classes(
    files: list[Path], folder: Path, label_column: str | None, left_out: LeftOut
) -> Images:
    """Returns the images of a split with their classes.

    The classes are the names of the folders in `folder`. If there are none, or `label_column` is
    set, they come from a table of the files in `folder`. Adds images without a folder to `left_out`
    if others have one.
    """
    table = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    in_folders = [file for file in files if file.parent != folder]
    if table and (label_column or not in_folders):
        left_out[f"files of type {table.suffix}"].remove(table)
        classes = read_metadata(table, label_column)
        return Images(files, [classes.get(str(file.relative_to(folder))) for file in files])
    if not in_folders:
        return Images(files, None)
    left_out["pictures outside the class folders"] += [
        file for file in files if file.parent == folder
    ]
    return Images(in_folders, [to_text(file.relative_to(folder).parts[0]) for file in in_folders])


def read_metadata(file: Path, label_column: str | None) -> dict[str, str | None]:
    """Returns the classes in a table of images by `file_name`. Raises UserError if it has no such
    column, or is damaged."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            is_csv = file.suffix == ".csv"
            rows = list(csv.DictReader(lines) if is_csv else map(json.loads, lines))
        names = [row.pop("file_name") for row in rows]
    except (KeyError, AttributeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{file} is not a table with a column 'file_name' ({error!r}); fix or remove it."
        ) from error
    columns = [name for name in (rows[0] if rows else ()) if name]
    label = choose_label(
        label_column, columns, texts=columns, read=lambda name: [row.get(name) for row in rows]
    )
    say_columns(to_text(file), Columns("file_name", label, ()), columns)
    return {name: row.get(label) for name, row in zip(names, rows, strict=True)}


def has_images(folder: Path) -> bool:
    """Returns whether there are images in a folder or its folders."""
    return any(True for _ in ImageFinder([folder]).walk(folder))


class ImageFinder:
    """Finds image files, each once, and records other files in `left_out`, by the reason.

    Links to files are followed. Links to folders are followed if they lead away from `roots`, the
    folders that are read; links to folders below such a link are not, so that every search ends.
    """

    def __init__(self, roots: Sequence[Path]):
        Image.init()
        formats = Image.registered_extensions()
        self.suffixes = {suffix for suffix in SUFFIXES if formats.get(suffix) in Image.OPEN}
        self.roots = [root.resolve() for root in roots]
        self.left_out: LeftOut = defaultdict(list)

    def find(self, folder: Path) -> list[Path]:
        """Returns the image files in a folder and its folders, sorted. Raises OSError if a folder
        cannot be read."""
        files, seen = [], set()
        for file in sorted(self.walk(folder)):
            status = file.stat()
            if (status.st_dev, status.st_ino) in seen:
                self.left_out["links to pictures counted before"].append(file)
            else:
                seen.add((status.st_dev, status.st_ino))
                files.append(file)
        return files

    def is_image(self, path: Path) -> bool:
        """Returns whether a path is a file with the suffix of an image that Pillow can open."""
        hidden = path.name.startswith(".")
        return not hidden and path.suffix.lower() in self.suffixes and path.is_file()

    def walk(self, folder: Path, by_link: bool = False) -> Iterator[Path]:
        """Yields the image files in a folder and its folders. `by_link` is true below a link."""
        for path in sorted(folder.iterdir()):
            suffix = path.suffix.lower()
            if path.name.startswith("."):
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
            elif suffix in SUFFIXES:
                self.left_out[f"files of type {suffix}, which Pillow cannot open"].append(path)
            else:
                self.left_out[
                    f"files of type {suffix}" if suffix else "files without a suffix"
                ].append(path)

    def _is_read(self, folder: Path) -> bool:
        return any(
            folder.is_relative_to(root) or root.is_relative_to(folder) for root in self.roots
        )
