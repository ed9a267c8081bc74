"""Reads PyTorch's files (`.pth`, `.pt`, `.ckpt`) without PyTorch, in the present format (a zip) and
in the one before version 1.6.

They are pickles. Tensors and plain containers are read; everything else that a file names becomes
an object that does nothing, so none of its code runs. Tensors are views of the mapped file, except
those of bfloat16, which are converted to float32.
"""

import collections
import functools
import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from taming_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # an older file's first pickle
DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "|i1",
    "ByteStorage": "|u1", "BoolStorage": "|b1",
}  # fmt: skip

DAMAGE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ImportError,
    OverflowError, RuntimeError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile,
    struct.error, zlib.error,
)  # fmt: skip


def read_storage(raw: Any, kind: str, count: int) -> np.ndarray:
    """A storage's bytes as a flat array that must not be written to; bfloat16 as a float32 copy.
    Raises ValueError where there are too few bytes."""
    array = np.frombuffer(raw, DTYPES[kind])[:count]
    if len(array) < count:
        raise ValueError("it is cut short")
    if kind == "BFloat16Storage":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def view_storage(
    storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any
) -> np.ndarray:
    """A tensor, which is a view of a storage. Raises ValueError where it cannot be one."""
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor has no shape")
    if math.prod(shape) > len(storage):
        raise ValueError("a tensor is larger than its storage")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= len(storage) and 0 not in shape:
        raise ValueError("a tensor reaches beyond its storage")
    steps = [s * storage.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


class Inert:
    """Stands in place of what a file names besides tensors and containers, such as the arguments of
    a training script: it takes everything and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


READ: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): view_storage,
    ("torch._utils", "_rebuild_tensor"): view_storage,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
} | {("torch", name): name for name in DTYPES}


class TensorUnpickler(pickle.Unpickler):
    """Reads containers and tensors, whose storages `storage` returns by kind, key and size."""

    def __init__(self, stream: Any, storage: Callable[[str, str, int], np.ndarray]):
        super().__init__(stream)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return READ.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, _, count, *view = pid
        if any(view):
            raise ValueError("it has views of storages, of PyTorch before 0.4")
        return self.storage(kind, key, count)


def open_tensors(file: Path) -> Any:
    """What a file holds: its containers as they are, its tensors as arrays that must not be written
    to.

    Raises UserError for a file that is missing, damaged, or not one of PyTorch's.
    """
    try:
        with file.open("rb") as stream:
            zipped = stream.read(2) == b"PK"
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            zipped = zipped or zipfile.is_zipfile(stream)
            return from_zip(stream, mapped) if zipped else from_stream(mapped)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except DAMAGE as error:
        raise UserError(f"{file} is not a complete PyTorch file ({error}).") from error


def from_zip(stream: IO[bytes], mapped: mmap.mmap) -> Any:
    """Reads the present format: a pickle, and one file per storage."""
    with zipfile.ZipFile(stream) as content:
        (name,) = (each for each in content.namelist() if each.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        if any(part.compress_type != zipfile.ZIP_STORED for part in content.infolist()):
            raise ValueError("it is compressed, as PyTorch's files are not")

        @functools.cache
        def storage(kind: str, key: str, count: int) -> np.ndarray:
            raw = stored_bytes(mapped, content.getinfo(f"{folder}data/{key}"))
            return read_storage(raw, kind, count)

        return TensorUnpickler(io.BytesIO(content.read(name)), storage).load()


def stored_bytes(mapped: mmap.mmap, part: zipfile.ZipInfo) -> memoryview:
    """The content of a file that lies uncompressed in a zip. Raises ValueError where it was
    changed."""
    at = part.header_offset
    name, extra = struct.unpack("<HH", mapped[at + 26 : at + 30])
    start = at + 30 + name + extra
    content = memoryview(mapped)[start : start + part.file_size]
    if zlib.crc32(content) != part.CRC:
        raise ValueError(f"{part.filename} was changed")
    return content


def from_stream(mapped: mmap.mmap) -> Any:
    """Reads the older format: three header pickles, the content's, the storages' keys in order, and
    the storages, each after its length. The content is read twice, since its storages come after
    it."""
    if mapped[:1] != b"\x80":
        raise ValueError("it does not begin as one")
    kinds: dict[str, tuple[str, int]] = {}
    storages: dict[str, np.ndarray] = {}

    def placeholder(kind: str, key: str, count: int) -> np.ndarray:
        kinds[key] = kind, count
        return np.broadcast_to(np.zeros((), DTYPES[kind]), count)

    def load(storage: Callable[[str, str, int], np.ndarray] = placeholder) -> Any:
        return TensorUnpickler(mapped, storage).load()

    if load() != MAGIC:
        raise ValueError("its magic number is wrong")
    load(), load()
    start = mapped.tell()
    load()
    keys, at = load(), mapped.tell()
    for key in keys:
        kind, count = kinds[key]
        (length,) = struct.unpack("<q", mapped[at : at + 8])
        end = at + 8 + length * np.dtype(DTYPES[kind]).itemsize
        if length < 0 or end > len(mapped):
            raise ValueError("it is cut short")
        storages[key] = read_storage(memoryview(mapped)[at + 8 : end], kind, count)
        at = end
    mapped.seek(start)
    return load(lambda kind, key, count: storages[key])
