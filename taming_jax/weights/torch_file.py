"""Reads PyTorch's files (`.pth`, `.pt`, `.ckpt`) without PyTorch, in the present format (a zip) and
in the one before version 1.6.

They are pickles. Tensors and plain containers are read; in place of everything else that a file
names stands an object that does nothing, so none of its code runs. Arrays are views of the mapped
file, so only what is used of it is in memory.
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


class Storage:
    """A flat array of one type, that tensors are views of. `raw` is its content, once that is
    known."""

    def __init__(self, kind: str, count: int):
        self.kind, self.count = kind, count
        self.raw: Callable[[], Any] = bytes

    @property
    def data(self) -> np.ndarray:
        """Its content; of bfloat16 its bits."""
        array = np.frombuffer(self.raw(), DTYPES[self.kind])
        if len(array) < self.count:
            raise ValueError("it is cut short")
        return array[: self.count]


class Tensor:
    """A view of a storage, `shape` and all, whose content is read when `array` is called. Raises
    ValueError for what is no view."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple, *rest: Any):
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor has no shape")
        if math.prod(shape) > storage.count:
            raise ValueError("a tensor is larger than its storage")
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        """A view of the file, not to be written in (of bfloat16 a float32 copy). Raises ValueError
        where it would reach beyond its storage."""
        data = self.storage.data[self.offset :]
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min(self.shape, default=1) and last >= len(data):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [s * data.itemsize for s in self.strides]
        view = np.lib.stride_tricks.as_strided(data, self.shape, strides, writeable=False)
        if self.storage.kind == "BFloat16Storage":  # the upper half of a float32
            return (view.astype(np.uint32) << 16).view(np.float32)
        return view


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
    # Not the class itself, whose attributes a file could set.
    ("torch._utils", "_rebuild_tensor_v2"): lambda *view: Tensor(*view),
    ("torch._utils", "_rebuild_tensor"): lambda *view: Tensor(*view),
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
} | {("torch", name): name for name in DTYPES}


class TensorUnpickler(pickle.Unpickler):
    """Reads tensors, whose storages `storage` returns by their persistent names, and containers."""

    def __init__(self, stream: IO[bytes], storage: Callable[[Any], Storage]):
        super().__init__(stream)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return READ.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Storage:
        kind, key, count = pid[1], pid[2], pid[4]
        if not (isinstance(kind, str) and isinstance(key, str) and type(count) is int):
            raise ValueError("a storage has no name")
        return self.storage(pid)


def open_tensors(file: Path) -> Any:
    """What a file holds, its containers as they are and its tensors as `Tensor`s.

    Raises UserError for a file that is missing, damaged, or none of PyTorch's.
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
        raise damaged(file, error) from error


def damaged(file: Path, error: BaseException) -> UserError:
    return UserError(f"{file} is not a whole file of PyTorch's ({error}).")


def from_zip(stream: IO[bytes], mapped: mmap.mmap) -> Any:
    """The present format: a pickle, and a file a storage."""
    with zipfile.ZipFile(stream) as content:
        (name,) = (each for each in content.namelist() if each.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        storages: dict[str, Storage] = {}

        def storage(pid: Any) -> Storage:
            _, kind, key, _, count = pid
            if key not in storages:
                storages[key] = Storage(kind, count)
                part = content.getinfo(f"{folder}data/{key}")
                storages[key].raw = functools.cache(lambda: piece(mapped, part))
            return storages[key]

        if any(part.compress_type != zipfile.ZIP_STORED for part in content.infolist()):
            raise ValueError("it is compressed, as PyTorch's files are not")
        return TensorUnpickler(io.BytesIO(content.read(name)), storage).load()


def piece(mapped: mmap.mmap, part: zipfile.ZipInfo) -> memoryview:
    """The content of a file that lies in a zip as it is; ValueError where it was changed."""
    at = part.header_offset
    name, extra = struct.unpack("<HH", mapped[at + 26 : at + 30])
    start = at + 30 + name + extra
    content = memoryview(mapped)[start : start + part.file_size]
    if zlib.crc32(content) != part.CRC:
        raise ValueError(f"{part.filename} was changed")
    return content


def from_stream(mapped: mmap.mmap) -> Any:
    """The older format: three pickles about the file, the content's, the storages' names in order,
    and the storages, each after its length."""
    if mapped[:1] != b"\x80":
        raise ValueError("it does not begin as one")
    storages: dict[str, Storage] = {}
    pickles = io.BytesIO(mapped)

    def storage(pid: Any) -> Storage:
        _, kind, key, _, count, *view = pid
        if any(view):
            raise ValueError("it has views of storages, of PyTorch before 0.4")
        return storages.setdefault(key, Storage(kind, count))

    def load() -> Any:
        return TensorUnpickler(pickles, storage).load()

    if load() != MAGIC:
        raise ValueError("its first number is another")
    load(), load()
    content = load()
    keys, at = load(), pickles.tell()
    for key in keys:
        (count,) = struct.unpack("<q", mapped[at : at + 8])
        start, size = at + 8, np.dtype(DTYPES[storages[key].kind]).itemsize
        at = start + count * size
        if count < 0 or at > len(mapped):
            raise ValueError("it is cut short")
        storages[key].raw = functools.partial(memoryview(mapped).__getitem__, slice(start, at))
    return content
