"""Reads PyTorch files (`.pth`, `.pt`, `.ckpt`) without PyTorch: the current zip format, and the
legacy format from before version 1.6.

These files are pickles. Only tensors and plain containers are restored. An object that does nothing
replaces everything else, so no code from the file runs. Tensors are views of the memory-mapped
file, except those of bfloat16, which are converted to float32.
"""

import collections
import functools
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from taming_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a legacy file
DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "|i1",
    "ByteStorage": "|u1", "BoolStorage": "|b1",
}  # fmt: skip

MAX_DEPTH, MAX_ITEMS = 1000, 10**6  # of nested tuples

DAMAGE_ERRORS = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ImportError,
    OverflowError, RuntimeError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile,
    struct.error, zlib.error,
)  # fmt: skip


def read_storage(raw: Any, kind: str, count: int) -> np.ndarray:
    """Returns the bytes `raw` as a flat read-only array, or for bfloat16 as a float32 copy.

    Raises ValueError if there are too few bytes.
    """
    array = np.frombuffer(raw, DTYPES[kind])[:count]
    if len(array) < count:
        raise ValueError("it is truncated")
    if kind == "BFloat16Storage":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def view_storage(
    storage: "np.ndarray | Inert", offset: int, shape: tuple, strides: tuple, *_: Any
) -> "np.ndarray | Inert":
    """Returns a tensor as a read-only view of a storage, or the storage itself if it is inert.
    Raises ValueError if the tensor is invalid."""
    if isinstance(storage, Inert):
        return storage
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor has an invalid shape")
    if math.prod(shape) > len(storage):
        raise ValueError("a tensor is larger than its storage")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= len(storage) and 0 not in shape:
        raise ValueError("a tensor extends beyond its storage")
    steps = [s * storage.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


class Inert:
    """A placeholder that does nothing, for an object that is neither a tensor nor a container, such
    as the arguments of a training script."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return self

    def append(self, value: Any) -> None:
        pass

    extend = add = update = append


class Ordered(collections.OrderedDict):
    """An OrderedDict whose attributes a pickle cannot set."""

    def __setstate__(self, state: Any) -> None:
        pass


class Rebuild:
    """A function that rebuilds a tensor. A pickle can call it, but not change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        pass


SUPPORTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Ordered,
    ("torch._utils", "_rebuild_tensor_v2"): Rebuild(view_storage),
    ("torch._utils", "_rebuild_tensor"): Rebuild(view_storage),
    ("torch._utils", "_rebuild_parameter"): Rebuild(lambda tensor, *_: tensor),
    ("torch._utils", "_rebuild_parameter_with_state"): Rebuild(lambda tensor, *_: tensor),
    ("torch._tensor", "_rebuild_from_type_v2"): Rebuild(
        lambda rebuild, _, arguments, *__: rebuild(*arguments)
    ),
} | {("torch", name): name for name in DTYPES}


def check_pickle(stream: Any) -> None:
    """Follows the stack of a pickle without loading it. Raises ValueError if its tuples are nested
    so deeply, or repeat the same items so often, that hashing them would crash or never end, or if
    it reserves far more memory for its memo than it uses."""
    stack: list[Any] = []  # the depth and the number of items of each object, or None for a mark
    memo: dict[int, tuple[int, int]] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if "PUT" in name or name == "MEMOIZE":
            key = int(len(memo) if argument is None else argument)
            if key > 2 * len(memo) + 1000:
                raise ValueError("its memo is too large")
            memo[key] = stack[-1] or (0, 0)
        elif "GET" in name:
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(None)
        else:
            parts = []
            for kind in reversed(before):
                if kind is pickletools.stackslice:
                    while (item := stack.pop()) is not None:
                        parts.append(item)
                elif kind is not pickletools.markobject:
                    parts.append(stack.pop() or (0, 0))
            depth = 1 + max((item[0] for item in parts), default=0)
            size = 1 + sum(item[1] for item in parts)
            if "TUPLE" in name and (depth > MAX_DEPTH or size > MAX_ITEMS):
                raise ValueError("its tuples are nested too deeply")
            stack += [(depth, size)] * len(after)


class TensorUnpickler(pickle.Unpickler):
    """An unpickler of containers and tensors. `load_storage` returns a storage, given its kind, key
    and number of elements."""

    def __init__(self, stream: Any, load_storage: Callable[[str, str, int], np.ndarray]):
        super().__init__(stream)
        self.stream, self.load_storage = stream, load_storage

    def load(self) -> Any:
        start = self.stream.tell()
        check_pickle(self.stream)
        self.stream.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        return SUPPORTED.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> np.ndarray | Inert:
        _, kind, key, _, count, *view = pid
        if isinstance(kind, type) and issubclass(kind, Inert):  # such as float8, which numpy lacks
            return Inert()
        if any(view):
            raise ValueError("its storages are views, as written by PyTorch before 0.4")
        return self.load_storage(kind, key, count)


def open_tensors(file: Path) -> Any:
    """Returns the content of a file: containers as they are, and tensors as read-only arrays.

    Raises UserError if the file is missing, damaged, or not a PyTorch file.
    """
    try:
        with file.open("rb") as stream:
            is_zip = stream.read(2) == b"PK"
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            is_zip = is_zip or zipfile.is_zipfile(stream)
            return read_zip(stream, mapped) if is_zip else read_legacy(mapped)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} is damaged or not a PyTorch file ({reason}); download or copy it again."
        ) from error


def read_zip(stream: IO[bytes], mapped: mmap.mmap) -> Any:
    """Reads the current format, a zip of a pickle and one file per storage."""
    with zipfile.ZipFile(stream) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed, but PyTorch does not compress its files")

        @functools.cache
        def load_storage(kind: str, key: str, count: int) -> np.ndarray:
            raw = read_stored_bytes(mapped, archive.getinfo(f"{folder}data/{key}"))
            return read_storage(raw, kind, count)

        return TensorUnpickler(io.BytesIO(archive.read(pickled)), load_storage).load()


def read_stored_bytes(mapped: mmap.mmap, part: zipfile.ZipInfo) -> memoryview:
    """Returns the content of an uncompressed file in a zip. Raises ValueError if its checksum is
    wrong."""
    header = part.header_offset
    name_size, extra_size = struct.unpack("<HH", mapped[header + 26 : header + 30])
    start = header + 30 + name_size + extra_size
    content = memoryview(mapped)[start : start + part.file_size]
    if zlib.crc32(content) != part.CRC:
        raise ValueError(f"{part.filename} has the wrong checksum")
    return content


def read_legacy(mapped: mmap.mmap) -> Any:
    """Reads the legacy format: three pickles about the file, one of the content, one of the storage
    keys in order, and the storages, each preceded by its length. Reads the content twice, since the
    storages follow it."""
    if mapped[:1] != b"\x80":
        raise ValueError("it does not start with a pickle")
    kinds: dict[str, tuple[str, int]] = {}
    storages: dict[str, np.ndarray] = {}

    def create_placeholder(kind: str, key: str, count: int) -> np.ndarray:
        kinds[key] = kind, count
        return np.broadcast_to(np.zeros((), DTYPES[kind]), count)

    def load(load_storage: Callable[[str, str, int], np.ndarray] = create_placeholder) -> Any:
        return TensorUnpickler(mapped, load_storage).load()

    if load() != MAGIC:
        raise ValueError("its magic number is wrong")
    load(), load()
    start = mapped.tell()
    load()
    keys, offset = load(), mapped.tell()
    for key in keys:
        kind, count = kinds[key]
        (length,) = struct.unpack("<q", mapped[offset : offset + 8])
        end = offset + 8 + length * np.dtype(DTYPES[kind]).itemsize
        if length < 0 or end > len(mapped):
            raise ValueError("it is truncated")
        storages[key] = read_storage(memoryview(mapped)[offset + 8 : end], kind, count)
        offset = end
    mapped.seek(start)
    return load(lambda kind, key, count: storages[key])
