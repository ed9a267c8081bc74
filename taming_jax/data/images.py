"""Decodes and resizes encoded images to uint8 arrays once, and caches them on disk.

Each decoded split is an entry of the cache: a folder whose name is a hash of the encoded images and
of how they are resized. `images.u8` holds the raw pixels, which are memory-mapped. `about.json`
lists the images in the entry, describes those that cannot be read, and holds checksums. It is
written last, and an entry is valid only if its checksums match the images.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import filelock
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from taming_jax.config.schema import DataConfig
from taming_jax.errors import UserError, say
from taming_jax.progress import Progress
from taming_jax.storage import atomic_file, atomic_write, hash_json, user_cache

FULL_SCALES = (1, 255, 1023, 4095, 65535)  # of gray values: 1, 8, 10, 12 or 16 bits
# Formats whose decoders hold several copies of an image.
MEMORY_HEAVY_FORMATS = ("AVIF", "HEIF", "JPEG2000", "WEBP")
VERSION = 4  # the version of the cache's format, which is part of each key
CHUNK = 64  # images that a thread decodes at a time
CHECKSUM_BYTES = 2**26  # bytes per checksum


class Reader(Protocol):
    """Encoded images by number, which several threads can read at the same time."""

    def __getitem__(self, number: int) -> bytes: ...


class Table(NamedTuple):
    """The encoded images and classes of a split, as its source stores them.

    `names` identify the images in messages. `classes` holds one class per image, a number or a
    name, or is None if the data has no classes. `class_names` are the names of numbered classes, or
    empty. `content` is a string that changes when an image changes.
    """

    reader: Reader
    names: Sequence[str]
    classes: Sequence[Any] | None
    class_names: tuple[str, ...]
    content: str


@dataclass(frozen=True)
class EncodedImages:
    """Images that are not decoded yet: the images with the numbers `numbers`, int [n], of a table,
    and their classes `labels`, int32 [n]."""

    table: Table
    numbers: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, index: np.ndarray) -> "EncodedImages":
        """Returns the images at the positions `index`, int [m]."""
        return EncodedImages(self.table, self.numbers[index], self.labels[index])

    def name(self, position: int) -> str:
        return self.table.names[self.numbers[position]]


@contextlib.contextmanager
def lift_pillow_limits() -> Iterator[None]:
    """Lifts Pillow's limits on pixels and on texts in PNG files, which are global, since they also
    refuse good pictures. `decode` has a limit of its own. Silences Pillow's warnings, such as those
    about damaged EXIF data."""
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits


def scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Scales gray values to uint8 by their range: from 0 to the smallest of `FULL_SCALES` that is
    not exceeded. Floats may lie up to 0.1 outside the range, as after resampling, and are clipped.
    Raises ValueError for other values."""
    low, high = float(values.min()), float(values.max())
    tolerance = 0.1 if values.dtype.kind == "f" else 0.0
    scales = [scale for scale in FULL_SCALES if high <= scale + tolerance and low >= -tolerance]
    if not scales:  # also if there are NaNs
        raise ValueError(
            f"its values range from {low:g} to {high:g}; they must lie between 0 and "
            f"{FULL_SCALES[-1]}"
        )
    return np.round(values.clip(0, scales[0]) * (255 / scales[0])).astype(np.uint8)


def decode(
    content: bytes,
    size: int | tuple[int, int],
    channels: int,
    resize_mode: str,
    max_mib: int = DataConfig.max_decoded_mib,
) -> np.ndarray:
    """Decodes the bytes of an image file to uint8 [h,w,channels].

    `size` is both h and w, or the tuple (h, w). The image is rotated as its EXIF data says, its
    transparent pixels become white, and it is resized with antialiased bicubic interpolation: if
    `resize_mode` is "crop", the largest centered part with the target's aspect ratio; if it is
    "squeeze", the whole image.

    Raises exceptions of many types if the image cannot be read, or decoding it takes more than
    about `max_mib` MiB.
    """
    target_height, target_width = (size, size) if isinstance(size, int) else size
    if content.startswith((b"\0\0\1\0", b"icns")):  # Pillow decodes them before it tells the size
        raise ValueError("icons are not read as pictures")
    with Image.open(io.BytesIO(content)) as opened:
        if opened.format == "EPS":
            raise ValueError("it is a PostScript program, which is not run")
        # A progressive JPEG is decoded whole, to two bytes per value, before it is made smaller.
        coefficients = 6 * opened.width * opened.height if opened.info.get("progressive") else 0
        # Decodes a JPEG at an eighth, a quarter or half of its size if that is enough.
        opened.draft(None, (2 * target_width, 2 * target_height))
        copies = 4 if opened.format in MEMORY_HEAVY_FORMATS else 2
        needed = (coefficients + 4 * copies * opened.width * opened.height) // 2**20
        if needed > max_mib:
            raise ValueError(
                f"decoding takes {needed} MiB; --data.max-decoded-mib allows {max_mib}"
            )
        opened.load()
        with contextlib.suppress(Exception):  # of many types, for damaged EXIF data
            ImageOps.exif_transpose(opened, in_place=True)
        image: Image.Image = opened
    if image.mode[0] in "IF":
        image = Image.fromarray(scale_to_bytes(np.asarray(image)))
    mode = "L" if channels == 1 else "RGB"
    is_transparent = "A" in image.getbands() or "transparency" in image.info
    if image.mode != ("RGBA" if is_transparent else mode):
        image = image.convert("RGBA" if is_transparent else mode)
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if resize_mode == "crop":
        crop_width = min(width, height * target_width / target_height)
        crop_height = min(height, width * target_height / target_width)
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
        box = (left, top, left + crop_width, top + crop_height)
    image = image.resize((target_width, target_height), Image.Resampling.BICUBIC, box=box)
    if is_transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    return np.asarray(image).reshape(target_height, target_width, channels)


def get_cache_folder(config: DataConfig) -> Path:
    """Returns the folder of the image cache. Default: the user's own cache folder."""
    return user_cache() if config.cache is None else Path(config.cache)


class DecodedSplit(NamedTuple):
    """The readable images of a split.

    `images` uint8 [n,size,size,channels] are memory-mapped, `labels` int32 [n] are their classes,
    and `problem` is a phrase about the images that cannot be read, or empty.
    """

    images: np.ndarray
    labels: np.ndarray
    problem: str


def decode_split(encoded: EncodedImages, size: int, config: DataConfig, split: str) -> DecodedSplit:
    """Returns the images of a split from the cache, and decodes them into it if necessary.

    Raises UserError if an image file cannot be read, the cache cannot be used, or none of the
    images can be decoded.
    """
    parts = [
        VERSION,
        encoded.table.content,
        size,
        config.channels,
        config.resize_mode,
    ]
    key = hashlib.sha256(json.dumps(parts).encode() + encoded.numbers.tobytes()).hexdigest()[:20]
    entry = get_cache_folder(config) / key
    shape = (len(encoded), size, size, config.channels)
    try:
        entry.mkdir(parents=True, exist_ok=True)
        cached = read_entry(entry, encoded, shape, config)
        if cached is None:
            with lock_entry(entry, split):
                # Another process may have written it.
                cached = read_entry(entry, encoded, shape, config)
                cached = cached or write_entry(entry, encoded, shape, config, split)
        return cached
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            reason = f"the disk is full, and {np.prod(shape) / 2**20:.0f} MiB are needed"
        raise UserError(
            f"the image cache {entry.parent} cannot be used: {reason}; fix this or choose another "
            "--data.cache."
        ) from error


def lock_entry(entry: Path, split: str) -> contextlib.AbstractContextManager[Any]:
    """Locks an entry against other processes. Returns a context manager that releases the lock,
    which the operating system also does if the process dies."""
    lock = filelock.FileLock(entry / ".lock")
    try:
        return lock.acquire(blocking=False)
    except filelock.Timeout:
        say(f"{split}: another process is decoding the same pictures; waiting for it.")
        return lock.acquire()


def read_entry(
    entry: Path, encoded: EncodedImages, shape: tuple[int, ...], config: DataConfig
) -> DecodedSplit | None:
    """Reads an entry of the cache. Returns None if it does not exist or is damaged, or if it leaves
    out pictures and was written with another `max_decoded_mib`."""
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        if about.pop("hash", None) != hash_json(about):
            return None
        if about["problem"] and about["max_decoded_mib"] != config.max_decoded_mib:
            return None
        kept = np.array(about["kept"])
        images = np.memmap(entry / "images.u8", np.uint8, "r", shape=(len(kept), *shape[1:]))
    except (FileNotFoundError, ValueError):
        return None
    if compute_checksums(images) != about["checksums"]:
        return None
    return DecodedSplit(images, encoded.labels[kept], about["problem"])


def write_entry(
    entry: Path, encoded: EncodedImages, shape: tuple[int, ...], config: DataConfig, split: str
) -> DecodedSplit:
    """Decodes images into an entry of the cache and returns it. Raises UserError if no image can
    be decoded, and OSError if the entry cannot be written."""
    with atomic_file(entry / "images.u8") as file:
        images = np.memmap(file, np.uint8, "w+", shape=shape)
        if hasattr(os, "posix_fallocate"):  # so that a full disk raises here, without SIGBUS later
            with file.open("r+b") as raw:
                os.posix_fallocate(raw.fileno(), 0, images.nbytes)
        bad = decode_all(encoded, images, config, split)
        problem = list_unreadable(encoded, bad, entry / "skipped.txt")
        kept = [i for i in range(len(encoded)) if i not in bad]
        if not kept:
            raise UserError(
                f"no picture of the {split} split can be read: {problem}. Fix or replace them."
            )
        if bad:
            for target, source in enumerate(kept):
                images[target] = images[source]
        about = {
            "kept": kept, "problem": problem, "checksums": compute_checksums(images[: len(kept)]),
            "max_decoded_mib": config.max_decoded_mib,
        }  # fmt: skip
        os.truncate(file, len(kept) * images[0].nbytes)
    about["hash"] = hash_json(about)
    atomic_write(entry / "about.json", json.dumps(about).encode())
    written = read_entry(entry, encoded, shape, config)
    if written is None:
        raise OSError(errno.EIO, "the entry differs from what was written")
    return written


def compute_checksums(images: np.ndarray) -> list[int]:
    """Computes one checksum per `CHECKSUM_BYTES` of images.

    They are checked whenever an entry is opened, since training would otherwise use damaged images
    without notice.
    """
    content = images.reshape(-1)
    starts = range(0, len(content), CHECKSUM_BYTES)
    parts = [content[start : start + CHECKSUM_BYTES].data for start in starts]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:  # zlib releases the GIL
        return list(threads.map(zlib.crc32, parts))


def decode_all(
    encoded: EncodedImages, images: np.ndarray, config: DataConfig, split: str
) -> dict[int, str]:
    """Decodes images into `images`, uint8 [n,size,size,channels], in parallel.

    Returns the positions of images that cannot be decoded, with the reasons. Raises UserError if
    an image file cannot be read from disk.
    """
    count, size, _, channels = images.shape

    def decode_chunk(start: int) -> dict[int, str]:
        bad = {}
        for position in range(start, min(start + CHUNK, count)):
            try:
                content = encoded.table.reader[int(encoded.numbers[position])]
                images[position] = decode(
                    content, size, channels, config.resize_mode, config.max_decoded_mib
                )
            except UnidentifiedImageError:
                bad[position] = "not a picture of a known format"
            except MemoryError:
                raise
            except Exception as error:  # damaged images raise many types of exceptions
                if isinstance(error, OSError) and error.errno is not None:  # the disk failed
                    raise UserError(
                        f"{error.filename or encoded.name(position)} cannot be read "
                        f"({error.strerror}); fix this and run the same command again."
                    ) from error
                bad[position] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return bad

    say(f"{split}: decoding {count} pictures to {size}x{size} into {get_cache_folder(config)}.")
    bad: dict[int, str] = {}
    # Threads suffice, since Pillow releases the GIL while it decodes and resizes.
    pool = concurrent.futures.ThreadPoolExecutor(config.workers or os.cpu_count() or 1)
    try:
        with lift_pillow_limits(), Progress("decoding", count, "pictures") as progress:
            for chunk in pool.map(decode_chunk, range(0, count, CHUNK)):
                bad |= chunk
                progress.update(CHUNK)
    finally:  # drops the remaining chunks after an error or Ctrl-C in a notebook
        pool.shutdown(cancel_futures=True)
    return bad


def list_unreadable(encoded: EncodedImages, bad: dict[int, str], file: Path) -> str:
    """Writes the names of unreadable images and the reasons to a file.

    Returns a phrase about them, which is empty if there are none.
    """
    if not bad:
        return ""
    lines = [f"{encoded.name(i)}\t{bad[i]}\n" for i in sorted(bad)]
    file.write_text("".join(lines), encoding="utf-8")
    first = min(bad)
    return (
        f"{len(bad)} of {len(encoded)} pictures cannot be read, for example {encoded.name(first)} "
        f"({bad[first]}); they are listed in {file}"
    )
