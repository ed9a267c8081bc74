"""From encoded pictures to uint8 arrays, once: decoding, resizing, and the cache on disk.

A decoded split lies in the cache as one folder: `images.u8` (raw bytes, memory-mapped) and
`about.json` (which pictures it holds, which could not be read, checksums), under a key of the
pictures' content and of how they were resized. `about.json` is written last, and an entry counts
only where it fits the images.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import filelock
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from taming_jax.config.schema import DataConfig
from taming_jax.errors import UserError, say
from taming_jax.progress import Progress
from taming_jax.storage import atomic_file, atomic_write, hash_json, user_cache

VERSION = 3  # of the cache's format; another version is another key
CHUNK = 64  # pictures that a thread decodes at a time
SUMMED = 2**26  # bytes a checksum


class Reader(Protocol):
    """Encoded pictures by number, which several threads read at once."""

    def __getitem__(self, number: int) -> bytes: ...


class Table(NamedTuple):
    """The pictures of a split as their source has them. `names` are what a person would call them.
    `classes` holds a value (a number, a name) per picture, or is None where the data has no
    classes; `class_names` are the names of numbers, empty where there are none; `content` changes
    when a picture does."""

    reader: Reader
    names: Sequence[str]
    classes: Sequence[Any] | None
    class_names: tuple[str, ...]
    content: str


@dataclass(frozen=True)
class Pictures:
    """Pictures that are not decoded yet: those at `numbers`, int [n], of a table, with their
    classes `labels`, int32 [n]."""

    table: Table
    numbers: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, index: np.ndarray) -> "Pictures":
        """Some of the pictures, by their places."""
        return Pictures(self.table, self.numbers[index], self.labels[index])

    def name(self, place: int) -> str:
        return self.table.names[self.numbers[place]]


def decode(
    content: bytes, size: int | tuple[int, int], channels: int, resize_mode: str
) -> np.ndarray:
    """A picture's bytes to uint8 [h,w,channels] of a size, or of a height and width: turned as EXIF
    says, transparency on white, its middle of that shape (or, with "squeeze", all of it) resized by
    antialiased bicubic interpolation.

    Raises some exception, of many kinds, where the picture cannot be read.
    """
    high, wide = (size, size) if isinstance(size, int) else size
    with Image.open(io.BytesIO(content)) as opened:
        # Pillow warns of these, and raises where there are twice as many pixels.
        if (pixels := opened.width * opened.height) > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError(f"it has {pixels} pixels")
        if resize_mode == "crop":
            # A JPEG is decoded at an eighth, a quarter or half its size where that is enough.
            opened.draft(None, (2 * wide, 2 * high))
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if resize_mode == "crop":
        across, down = min(width, height * wide / high), min(height, width * high / wide)
        left, top = (width - across) / 2, (height - down) / 2
        box = (left, top, left + across, top + down)
    image = image.resize((wide, high), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).reshape(high, wide, channels)


def cache_folder(config: DataConfig) -> Path:
    """The folder of the cache: the setting, else the user's own."""
    return user_cache() if config.cache is None else Path(config.cache)


class DecodedSplit(NamedTuple):
    """`images` uint8 [n,size,size,channels], memory-mapped, and `labels` int32 [n] of the pictures
    that can be read, and a phrase about those that cannot, empty where there are none."""

    images: np.ndarray
    labels: np.ndarray
    problem: str


def decode_split(pictures: Pictures, size: int, config: DataConfig, split: str) -> DecodedSplit:
    """The pictures of a split as arrays: decoded into the cache, in parallel, unless they are
    there.

    Raises UserError where a picture's file, or the cache, cannot be read or written, and where none
    of the pictures can be decoded.
    """
    parts = [
        VERSION,
        pictures.table.content,
        size,
        config.channels,
        config.resize_mode == "squeeze",
    ]
    key = hashlib.sha256(json.dumps(parts).encode() + pictures.numbers.tobytes()).hexdigest()[:20]
    entry = cache_folder(config) / key
    shape = (len(pictures), size, size, config.channels)
    try:
        entry.mkdir(parents=True, exist_ok=True)
        cached = read_entry(entry, pictures, shape)
        if cached is None:
            with lock_entry(entry, split):
                cached = read_entry(entry, pictures, shape)  # another process may have written it
                cached = cached or write_entry(entry, pictures, shape, config, split)
        return cached
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            reason = f"the disk is full, {np.prod(shape) / 2**20:.0f} MiB are needed"
        raise UserError(
            f"the image cache {entry.parent} cannot be used: {reason}; free it, or choose another "
            "--data.cache."
        ) from error


def lock_entry(entry: Path, split: str) -> contextlib.AbstractContextManager[Any]:
    """Keeps other processes from writing an entry; the lock ends with its process."""
    lock = filelock.FileLock(entry / ".lock")
    try:
        return lock.acquire(blocking=False)
    except filelock.Timeout:
        say(f"{split}: another process decodes the same pictures; waiting for it.")
        return lock.acquire()


def read_entry(entry: Path, pictures: Pictures, shape: tuple[int, ...]) -> DecodedSplit | None:
    """The entry of the cache in a folder; None where there is none, or it is damaged."""
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        if about.pop("hash", None) != hash_json(about):
            return None
        kept = np.array(about["kept"])
        images = np.memmap(entry / "images.u8", np.uint8, "r", shape=(len(kept), *shape[1:]))
    except (FileNotFoundError, ValueError):
        return None
    if checksums(images) != about["checksums"]:
        return None
    return DecodedSplit(images, pictures.labels[kept], about["says"])


def write_entry(
    entry: Path, pictures: Pictures, shape: tuple[int, ...], config: DataConfig, split: str
) -> DecodedSplit:
    """Decodes pictures into an entry of the cache, and returns it."""
    with atomic_file(entry / "images.u8") as file:
        images = np.memmap(file, np.uint8, "w+", shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk raises here, in place of a SIGBUS later
            with file.open("r+b") as raw:
                os.posix_fallocate(raw.fileno(), 0, images.nbytes)
        bad = decode_all(pictures, images, config, split)
        problem = list_unreadable(pictures, bad, entry / "skipped.txt")
        kept = [i for i in range(len(pictures)) if i not in bad]
        if not kept:
            raise UserError(f"no picture of the {split} split can be read: {problem}.")
        if bad:
            for to, source in enumerate(kept):
                images[to] = images[source]
        about = {"kept": kept, "says": problem, "checksums": checksums(images[: len(kept)])}
        os.truncate(file, len(kept) * images[0].nbytes)
    about["hash"] = hash_json(about)
    atomic_write(entry / "about.json", json.dumps(about).encode())
    written = read_entry(entry, pictures, shape)
    if written is None:
        raise OSError(errno.EIO, "what was written is not what is read")
    return written


def checksums(images: np.ndarray) -> list[int]:
    """Of images as they lie in memory or in a file, a number a part. At each start they are read
    through once: a harmed disk would else train another model without a word."""
    content = images.reshape(-1)
    parts = [content[at : at + SUMMED].data for at in range(0, len(content), SUMMED)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:  # which zlib lets run at once
        return list(threads.map(zlib.crc32, parts))


def decode_all(
    pictures: Pictures, images: np.ndarray, config: DataConfig, split: str
) -> dict[int, str]:
    """Decodes pictures into `images`, uint8 [n,size,size,channels]. Returns the places of those
    that cannot be decoded, and why. Raises UserError where a picture's file cannot be read."""
    count, size, _, channels = images.shape

    def decode_chunk(start: int) -> dict[int, str]:
        bad = {}
        for place in range(start, min(start + CHUNK, count)):
            try:
                content = pictures.table.reader[int(pictures.numbers[place])]
                images[place] = decode(content, size, channels, config.resize_mode)
            except UnidentifiedImageError:
                bad[place] = "no picture of a known kind"
            except MemoryError:
                raise
            except Exception as error:  # damage raises many kinds
                if isinstance(error, OSError) and error.errno is not None:  # the disk is to blame
                    raise UserError(
                        f"{error.filename or pictures.name(place)} cannot be read "
                        f"({error.strerror}); mend that, and run the same again."
                    ) from error
                bad[place] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return bad

    say(f"{split}: decoding {count} pictures to {size}x{size} into {cache_folder(config)}.")
    bad: dict[int, str] = {}
    # Threads, since Pillow releases Python's lock while it decodes and resizes.
    pool = concurrent.futures.ThreadPoolExecutor(config.workers or os.cpu_count() or 1)
    try:
        with Progress("decoding", count, "pictures") as progress:
            for chunk in pool.map(decode_chunk, range(0, count, CHUNK)):
                bad |= chunk
                progress.update(CHUNK)
    finally:  # after an error, or Ctrl-C in a notebook, the chunks that have not begun are dropped
        pool.shutdown(cancel_futures=True)
    return bad


def list_unreadable(pictures: Pictures, bad: dict[int, str], file: Path) -> str:
    """Names the pictures that cannot be read in a file, and returns a phrase about them."""
    if not bad:
        return ""
    lines = [f"{pictures.name(i)}\t{bad[i]}\n" for i in sorted(bad)]
    file.write_text("".join(lines), encoding="utf-8")
    first = min(bad)
    return (
        f"{len(bad)} of {len(pictures)} pictures cannot be read, {pictures.name(first)} for one "
        f"({bad[first]}); they are named in {file}"
    )
