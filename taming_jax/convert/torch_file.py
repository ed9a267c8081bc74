"""PyTorch's files, read without PyTorch: `.pth` and `.ckpt`, of the present format (a zip) and of
the one before version 1.6.

They are pickles. What is admitted are tensors and plain containers; a file that names anything else
is refused, and nothing of it is run.
"""

import collections
import io
import pickle
import struct
import zipfile
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


class Storage:
    """A flat array of one type, that tensors are views of; filled after the pickle is read."""

    def __init__(self, kind: str, count: int):
        self.kind, self.count = kind, count
        self.data = np.zeros(0)

    def fill(self, raw: bytes) -> None:
        array = np.frombuffer(raw, DTYPES[self.kind])
        if len(array) < self.count:
            raise ValueError("it is cut short")
        if self.kind == "BFloat16Storage":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        self.data = array[: self.count]


class Tensor:
    """A view of a storage, until the storage is filled."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple, *rest: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        """A copy. Raises ValueError where it would reach beyond its storage."""
        data = self.storage.data[self.offset :]
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        backwards = min(self.strides, default=0) < 0
        if min(self.shape, default=1) and (backwards or not 0 <= last < len(data)):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [s * data.itemsize for s in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(data, self.shape, strides))


class TensorUnpickler(pickle.Unpickler):
    """Admits tensors, their storages, and plain containers."""

    def __init__(self, stream: IO[bytes], storage: Callable[[Any], Storage]):
        super().__init__(stream)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        admitted: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): Tensor,
            ("torch._utils", "_rebuild_tensor"): Tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
        }
        if (module, name) in admitted:
            return admitted[module, name]
        if module == "torch" and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        return self.storage(pid)


def load_tensors(file: Path) -> Any:
    """What a file holds, its tensors as numpy arrays (bfloat16 as float32) and its containers as
    dictionaries, lists and tuples.

    Raises UserError for a file that is missing, damaged, none of PyTorch's, or asks for more than
    tensors and containers.
    """
    try:
        with file.open("rb") as stream:
            read = from_zip if zipfile.is_zipfile(stream) else from_stream
            stream.seek(0)
            return arrays(read(stream))
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is refused: {error}; only tensors and plain containers are read."
        ) from error
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ImportError,
            zipfile.BadZipFile, struct.error) as error:  # fmt: skip
        raise UserError(f"{file} is not a whole file of PyTorch's ({error}).") from error


def from_zip(stream: IO[bytes]) -> Any:
    """The present format: a pickle, and a file a storage."""
    with zipfile.ZipFile(stream) as content:
        (name,) = (each for each in content.namelist() if each.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        storages: dict[str, Storage] = {}

        def storage(pid: Any) -> Storage:
            _, kind, key, _, count = pid
            if key not in storages:
                storages[key] = Storage(kind, count)
                storages[key].fill(content.read(f"{folder}data/{key}"))
            return storages[key]

        return TensorUnpickler(io.BytesIO(content.read(name)), storage).load()


def from_stream(stream: IO[bytes]) -> Any:
    """The older format: three pickles about the file, the content's, the storages' names in order,
    and the storages, each after its length."""
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        _, kind, key, _, count, *view = pid
        if any(view):
            raise pickle.UnpicklingError("it has views of storages, of PyTorch before 0.4")
        return storages.setdefault(key, Storage(kind, count))

    def load() -> Any:
        return TensorUnpickler(stream, storage).load()

    if load() != MAGIC:
        raise ValueError("its first number is another")
    load(), load()
    content = load()
    for key in load():
        (count,) = struct.unpack("<q", stream.read(8))
        size = np.dtype(DTYPES[storages[key].kind]).itemsize
        storages[key].fill(stream.read(count * size))
    return content


def arrays(content: Any) -> Any:
    """Tensors as arrays, all the way down."""
    if isinstance(content, Tensor):
        return content.array()
    if isinstance(content, dict):
        return {key: arrays(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(arrays(value) for value in content)
    return content
