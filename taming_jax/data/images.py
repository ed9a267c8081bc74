"""From encoded pictures to uint8 arrays, once: decoding, resizing, and the cache on disk.

A decoded split lies in the cache as one folder: `images.u8` (raw bytes, memory-mapped) and
`about.json` (which pictures it holds, which could not be read, checksums), under a key of the
pictures' content and of how they were resized. It appears whole or not at all: it is written beside
its place and renamed.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import filelock
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from taming_jax.config.schema import DataConfig
from taming_jax.errors import UserError, say
from taming_jax.files import text_hash, user_cache
from taming_jax.progress import Progress

VERSION = 3  # of the cache's format; another version is another key
CHUNK = 64  # pictures that a thread decodes at a time
SUMMED = 2**26  # bytes a checksum


class Reader(Protocol):
    """Encoded pictures by number, which several threads read at once."""

    def __getitem__(self, number: int) -> bytes: ...


@dataclass(frozen=True)
class Pictures:
    """Pictures that are not decoded yet: `reader[numbers[i]]` are the bytes of picture i,
    `names[i]` is what a person would call it, `labels[i]` its class, int32. `content` stands for
    all of the reader's pictures: other pictures, another content."""

    reader: Reader
    numbers: np.ndarray
    names: Sequence[str]
    labels: np.ndarray
    content: str

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, index: np.ndarray) -> "Pictures":
        """Some of the pictures, by their places."""
        return replace(
            self, numbers=self.numbers[index], names=[self.names[i] for i in index],
            labels=self.labels[index],
        )  # fmt: skip


def decode(content: bytes, size: int | tuple[int, int], channels: int, squeeze: bool) -> np.ndarray:
    """A picture's bytes to uint8 [h,w,channels] of a size, or of a height and width: turned as EXIF
    says, transparency on white, its middle of that shape (or, to `squeeze`, all of it) resized by
    antialiased bicubic interpolation.

    Raises some exception, of many kinds, where the picture cannot be read.
    """
    high, wide = (size, size) if isinstance(size, int) else size
    with Image.open(io.BytesIO(content)) as opened:
        # Pillow warns of these, and raises where there are twice as many pixels.
        if (pixels := opened.width * opened.height) > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError(f"it has {pixels} pixels")
        if not squeeze:
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
    if not squeeze:
        across, down = min(width, height * wide / high), min(height, width * high / wide)
        left, top = (width - across) / 2, (height - down) / 2
        box = (left, top, left + across, top + down)
    image = image.resize((wide, high), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).reshape(high, wide, channels)


def cache_folder(config: DataConfig) -> Path:
    """The folder of the cache: the setting, else the user's own."""
    return user_cache() if config.cache is None else Path(config.cache)


class Decoded(NamedTuple):
    """`images` uint8 [n,size,size,channels], memory-mapped, and `labels` int32 [n] of the pictures
    that could be read; how many could not, and a phrase that says which."""

    images: np.ndarray
    labels: np.ndarray
    bad: int
    says: str


def decoded(pictures: Pictures, size: int, config: DataConfig, split: str) -> Decoded:
    """The pictures of a split as arrays: decoded into the cache, in parallel, unless they are
    there. Raises UserError where a picture's file, or the cache, cannot be read or written."""
    seen = [VERSION, pictures.content, size, config.channels, config.squeeze]
    key = hashlib.sha256(json.dumps(seen).encode() + pictures.numbers.tobytes()).hexdigest()[:20]
    root = cache_folder(config)
    place = root / key
    shape = (len(pictures), size, size, config.channels)
    try:
        root.mkdir(parents=True, exist_ok=True)
        found = opened(place, pictures, shape)
        if found is None:
            with locked(root / f".{key}.lock", split):
                for left in root.glob(f"{key}-partial-*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                found = opened(place, pictures, shape)  # another process may have been first
                if found is None:
                    shutil.rmtree(place, ignore_errors=True)
                    fill(place, pictures, shape, config, split)
                    found = opened(place, pictures, shape)
        if found is None:
            raise OSError(errno.EIO, "what was written is not what is read")
        return found
    except OSError as error:
        reason = error.strerror or str(error)
        file = root if error.filename is None else Path(os.fsdecode(error.filename))
        if not file.is_relative_to(root) and not root.is_relative_to(file):
            raise UserError(
                f"{file} cannot be read ({reason}); mend that, and run the same again."
            ) from error
        if error.errno == errno.ENOSPC:
            reason = f"the disk is full, {np.prod(shape) / 2**20:.0f} MiB are needed"
        raise UserError(
            f"the image cache {root} cannot be used: {reason}; free it, or choose another "
            "--data.cache."
        ) from error


def opened(place: Path, pictures: Pictures, shape: tuple[int, ...]) -> Decoded | None:
    """What lies in a place of the cache; None where nothing does, or it is damaged."""
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        if about.pop("hash") != text_hash(about):
            return None
        kept, bad, says = np.array(about["kept"], int), about["bad"], about["says"]
        images = np.zeros((0, *shape[1:]), np.uint8)
        if len(kept):  # an empty file cannot be mapped
            images = np.memmap(place / "images.u8", np.uint8, "r", shape=(len(kept), *shape[1:]))
        if checksums(images) != about["checksums"]:
            return None
        return Decoded(images, pictures.labels[kept], bad, says)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def checksums(images: np.ndarray) -> list[int]:
    """Of images as they lie in memory or in a file, a number a part. At each start they are read
    through once: a harmed disk would else train another model without a word."""
    content = images.reshape(-1)
    parts = [content[at : at + SUMMED].data for at in range(0, len(content), SUMMED)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:  # which zlib lets run at once
        return list(threads.map(zlib.crc32, parts))


@contextlib.contextmanager
def locked(file: Path, split: str) -> Iterator[None]:
    """Around work that one process at a time may do; the lock ends with its process."""
    lock = filelock.FileLock(file)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        say(f"{split}: another process decodes the same pictures; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fill(
    place: Path, pictures: Pictures, shape: tuple[int, ...], config: DataConfig, split: str
) -> None:
    """Decodes pictures into a new folder of the cache."""
    work = Path(tempfile.mkdtemp(prefix=f"{place.name}-partial-", dir=place.parent))
    try:
        file = work / "images.u8"
        with file.open("wb") as raw:
            if hasattr(os, "posix_fallocate"):  # a full disk is told now, not by a crash later
                os.posix_fallocate(raw.fileno(), 0, int(np.prod(shape)))
            else:
                raw.truncate(int(np.prod(shape)))
        images = np.memmap(file, np.uint8, "r+", shape=shape)
        bad = decode_all(pictures, images, config, split, place.parent)
        kept = [i for i in range(len(pictures)) if i not in bad]
        if bad:
            for to, source in enumerate(kept):
                images[to] = images[source]
            images.flush()
            os.truncate(file, len(kept) * int(np.prod(shape[1:])))
        written = np.memmap(file, np.uint8, "r") if kept else np.zeros(0, np.uint8)
        says = listed(pictures, bad, place.with_name(f"{place.name}-skipped.txt"))
        about = {
            "version": VERSION, "kept": kept, "bad": len(bad), "says": says,
            "checksums": checksums(written),
        }  # fmt: skip
        about["hash"] = text_hash(about)
        (work / "about.json").write_text(json.dumps(about), encoding="utf-8")
        for part in (file, work / "about.json"):  # on the disk before it has its name
            with part.open("r+b") as raw:
                os.fsync(raw.fileno())
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def decode_all(
    pictures: Pictures, images: np.ndarray, config: DataConfig, split: str, folder: Path
) -> dict[int, str]:
    """Decodes pictures into `images`, uint8 [n,size,size,channels], which a file in `folder` holds.
    Returns the places of the pictures that cannot be read, and why."""
    count, size, _, channels = images.shape

    def decode_chunk(start: int) -> dict[int, str]:
        bad = {}
        for place in range(start, min(start + CHUNK, count)):
            try:
                content = pictures.reader[int(pictures.numbers[place])]
                images[place] = decode(content, size, channels, config.squeeze)
            except UnidentifiedImageError:
                bad[place] = "no picture of a known kind"
            except MemoryError:
                raise
            except Exception as error:  # damage raises many kinds
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's trouble, not the picture's
                bad[place] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return bad

    say(f"{split}: decoding {count} pictures to {size}x{size} into {folder}.")
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


def listed(pictures: Pictures, bad: dict[int, str], file: Path) -> str:
    """Names the pictures that cannot be read in a file, and returns a phrase about them."""
    if not bad:
        return ""
    lines = [f"{pictures.names[i]}\t{bad[i]}\n" for i in sorted(bad)]
    file.write_text("".join(lines), encoding="utf-8")
    first = min(bad)
    return (
        f"{len(bad)} of {len(pictures)} pictures cannot be read, {pictures.names[first]} for one "
        f"({bad[first]}); they are named in {file}"
    )
