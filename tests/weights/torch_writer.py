"""Writes files as `torch.save` does, without PyTorch, for tests of what reads them."""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from taming_jax.weights.torch_file import DTYPES

ALIGNMENT = 64  # of a storage, as in PyTorch's files
PythonPickler: Any = pickle._Pickler  # the one in C writes no name of what cannot be imported


class Global(NamedTuple):
    """A name of a module as a pickle holds it."""

    module: str
    name: str

    def __call__(self) -> None:
        """For pickle, which wants what it writes as a function to be one."""


class Kept(NamedTuple):
    """A storage as a pickle names it."""

    kind: Global
    key: str
    size: int


class Whole(NamedTuple):
    """A tensor that is all of its storage, as a pickle holds it."""

    kept: Kept
    shape: tuple[int, ...]


class TensorPickler(PythonPickler):
    """Writes `Whole` tensors as PyTorch does."""

    def persistent_id(self, found: Any) -> Any:
        if isinstance(found, Kept):
            return ("storage", found.kind, found.key, "cpu", found.size)
        return None

    def save_global_name(self, found: Global) -> None:
        self.write(f"c{found.module}\n{found.name}\n".encode())

    def save_tensor(self, found: Whole) -> None:
        strides: list[int] = []
        size = 1
        for n in reversed(found.shape):
            strides.insert(0, size)
            size *= n
        hooks: Any = collections.OrderedDict()
        view = (found.kept, 0, found.shape, tuple(strides), False, hooks)
        self.save_reduce(Global("torch._utils", "_rebuild_tensor_v2"), view, obj=found)

    dispatch: ClassVar[Any] = {
        **PythonPickler.dispatch,
        Global: save_global_name,
        Whole: save_tensor,
    }


def write_tensors(file: Path, content: dict[str, Any]) -> None:
    """Writes a file that `torch.load` reads, of plain values and of arrays, in dictionaries."""
    kinds = {np.dtype(code): kind for kind, code in DTYPES.items() if kind != "BFloat16Storage"}
    held: list[np.ndarray] = []

    def named(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            held.append(value)
            kept = Kept(Global("torch", kinds[value.dtype]), str(len(held) - 1), value.size)
            return Whole(kept, value.shape)
        if isinstance(value, dict):
            return collections.OrderedDict((key, named(x)) for key, x in value.items())
        return value

    pickled = io.BytesIO()
    TensorPickler(pickled, 2).dump({key: named(value) for key, value in content.items()})
    with file.open("wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/version", "3\n")
        for i, array in enumerate(held):
            part = zipfile.ZipInfo(f"archive/data/{i}")
            # A zip64 header's own 20 bytes, and a field of zeros that fills up.
            missing = -(stream.tell() + 30 + len(part.filename) + 20 + 4) % ALIGNMENT
            part.extra = struct.pack("<HH", 0x4246, missing) + bytes(missing)
            with archive.open(part, "w", force_zip64=True) as place:
                place.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
