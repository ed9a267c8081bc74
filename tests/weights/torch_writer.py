"""Writes files like those of `torch.save`, without PyTorch, for tests of the readers."""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from taming_jax.weights.torch_file import DTYPES

ALIGNMENT = 64  # bytes; the alignment of storages in PyTorch's files
PythonPickler: Any = pickle._Pickler  # the C pickler refuses names that it cannot import


class Global(NamedTuple):
    """The name of a member of a module, as stored in a pickle."""

    module: str
    name: str

    def __call__(self) -> None:
        """Makes the name callable, because pickle requires a callable here."""


class StorageId(NamedTuple):
    """The ID of a storage, as stored in a pickle."""

    kind: Global
    key: str
    size: int


class FullTensor(NamedTuple):
    """A tensor that covers its whole storage, as stored in a pickle."""

    storage: StorageId
    shape: tuple[int, ...]


class TensorPickler(PythonPickler):
    """Writes `FullTensor` objects like PyTorch's tensors."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, StorageId):
            return ("storage", value.kind, value.key, "cpu", value.size)
        return None

    def save_global_name(self, value: Global) -> None:
        self.write(f"c{value.module}\n{value.name}\n".encode())

    def save_tensor(self, tensor: FullTensor) -> None:
        strides: list[int] = []
        size = 1
        for n in reversed(tensor.shape):
            strides.insert(0, size)
            size *= n
        hooks: Any = collections.OrderedDict()
        view = (tensor.storage, 0, tensor.shape, tuple(strides), False, hooks)
        self.save_reduce(Global("torch._utils", "_rebuild_tensor_v2"), view, obj=tensor)

    dispatch: ClassVar[Any] = {
        **PythonPickler.dispatch,
        Global: save_global_name,
        FullTensor: save_tensor,
    }


def write_tensors(file: Path, content: dict[str, Any]) -> None:
    """Writes a dictionary of plain values, arrays, and dictionaries to a file that `torch.load` can
    read."""
    storage_types = {
        np.dtype(code): kind for kind, code in DTYPES.items() if kind != "BFloat16Storage"
    }
    arrays: list[np.ndarray] = []

    def to_pickle_objects(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(value)
            storage = StorageId(
                Global("torch", storage_types[value.dtype]), str(len(arrays) - 1), value.size
            )
            return FullTensor(storage, value.shape)
        if isinstance(value, dict):
            return collections.OrderedDict((key, to_pickle_objects(x)) for key, x in value.items())
        return value

    pickle_stream = io.BytesIO()
    TensorPickler(pickle_stream, 2).dump(
        {key: to_pickle_objects(value) for key, value in content.items()}
    )
    with file.open("wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle_stream.getvalue())
        archive.writestr("archive/version", "3\n")
        for i, array in enumerate(arrays):
            part = zipfile.ZipInfo(f"archive/data/{i}")
            # 20 bytes of the zip64 field, and a field of zeros as padding.
            padding = -(stream.tell() + 30 + len(part.filename) + 20 + 4) % ALIGNMENT
            part.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            with archive.open(part, "w", force_zip64=True) as entry:
                entry.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
