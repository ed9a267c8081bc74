"""Tests with files in both of PyTorch's formats, which are written without PyTorch."""

import argparse
import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest

from taming_jax.errors import UserError
from taming_jax.weights.state_dict import open_state_dict
from taming_jax.weights.torch_file import MAGIC, Inert, open_tensors
from tests.weights.torch_writer import write_tensors

KINDS = {"f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage", "u2": "BFloat16Storage"}


@pytest.fixture
def torch(monkeypatch):
    """Modules with PyTorch's names, so that pickles can refer to their members."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("pickles refer to this function, but nothing may call it")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    tensors = types.ModuleType("torch._tensor")
    for module, name in (
        (utils, "_rebuild_parameter_with_state"),
        (tensors, "_rebuild_from_type_v2"),
    ):
        function = types.FunctionType(_rebuild_tensor_v2.__code__, {}, name)
        function.__module__, function.__qualname__ = module.__name__, name
        setattr(module, name, function)
    torch.Tensor = type("Tensor", (), {"__module__": "torch"})
    for name in KINDS.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    monkeypatch.setitem(sys.modules, "torch._tensor", tensors)
    return torch


class Tensor:
    """A view of a storage that is pickled in the same way as by PyTorch."""

    def __init__(self, torch, key, storage, offset, shape, strides):
        self.torch, self.key, self.storage = torch, key, storage
        self.view = offset, shape, strides

    def __reduce__(self):
        offset, shape, strides = self.view
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        backward_hooks = collections.OrderedDict()
        return rebuild, (StorageId(self), offset, shape, strides, False, backward_hooks)


class StorageId:
    """The persistent ID of a storage."""

    def __init__(self, tensor):
        kind = getattr(tensor.torch, KINDS[tensor.storage.dtype.str[1:]])
        self.name = ("storage", kind, tensor.key, "cpu", len(tensor.storage))


class Pickler(pickle.Pickler):
    old_format = False

    def persistent_id(self, value):
        if isinstance(value, StorageId):
            return (*value.name, None) if self.old_format else value.name
        return None


def make_pickle(content, old_format=False):
    stream = io.BytesIO()
    pickler = Pickler(stream, 2)
    pickler.old_format = old_format
    pickler.dump(content)
    return stream.getvalue()


def write_zip(file, content, storages):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", make_pickle(content))
        for key, storage in storages.items():
            archive.writestr(f"archive/data/{key}", storage.tobytes())


def write_old_format(file, content, storages):
    parts = [make_pickle(MAGIC), make_pickle(1001), make_pickle({"little_endian": True})]
    parts += [make_pickle(content, old_format=True), make_pickle(list(storages))]
    for storage in storages.values():
        parts.append(struct.pack("<q", len(storage)) + storage.tobytes())
    file.write_bytes(b"".join(parts))


STORAGES = {
    "0": np.arange(24, dtype=np.float32),
    "1": np.array([1.5, -2.0], np.float64),
    "2": np.array([7], np.int64),
    "3": (np.array([1.0, -0.5], np.float32).view(np.uint32) >> 16).astype(np.uint16),
}


def make_content(torch):
    def tensor(key, *view):
        return Tensor(torch, key, STORAGES[key], *view)

    state = collections.OrderedDict(
        weight=tensor("0", 0, (2, 3, 4), (12, 4, 1)),
        turned=tensor("0", 1, (3, 2), (1, 12)),
        double=tensor("1", 0, (2,), (1,)),
        number=tensor("2", 0, (), ()),
        half=tensor("3", 0, (2,), (1,)),
    )
    return {"state_dict": state, "epoch": 3, "names": ["a", ("b", None)]}


@pytest.mark.parametrize("write", [write_zip, write_old_format])
def test_tensors_and_containers_are_read(torch, tmp_path, write):
    write(tmp_path / "model.pth", make_content(torch), STORAGES)
    loaded = open_tensors(tmp_path / "model.pth")
    assert loaded["epoch"] == 3 and loaded["names"] == ["a", ("b", None)]
    state, flat = loaded["state_dict"], np.arange(24, dtype=np.float32)
    assert list(state) == ["weight", "turned", "double", "number", "half"]
    np.testing.assert_array_equal(state["weight"], flat.reshape(2, 3, 4))
    np.testing.assert_array_equal(state["turned"], [[1, 13], [2, 14], [3, 15]])
    np.testing.assert_array_equal(state["double"], [1.5, -2.0])
    assert state["number"] == 7 and state["number"].shape == ()
    np.testing.assert_array_equal(state["half"], [1.0, -0.5])
    assert state["half"].dtype == np.float32 and not state["weight"].flags.writeable


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder / "run"),)


@pytest.mark.parametrize("write", [write_zip, write_old_format])
def test_no_code_in_a_file_is_executed(torch, tmp_path, write):
    args = argparse.Namespace(lr=1e-4, ema=False)
    other_entries = {"run": Malicious(tmp_path), "args": args, "seen": {3}, "rng": np.float64(2.0)}
    write(tmp_path / "model.pth", other_entries | {"epoch": 3}, {})
    loaded = open_tensors(tmp_path / "model.pth")
    assert loaded.pop("epoch") == 3 and {type(x) for x in loaded.values()} == {Inert}
    assert not (tmp_path / "run").exists()


def test_incomplete_or_invalid_files_are_refused(torch, tmp_path):
    for write in (write_zip, write_old_format):
        file = tmp_path / f"{write.__name__}.pth"
        write(file, make_content(torch), STORAGES)
        content_bytes = file.read_bytes()
        for fraction in (0, 0.3, 0.6, 0.98):
            file.write_bytes(content_bytes[: int(fraction * len(content_bytes))])
            with pytest.raises(UserError, match="is damaged or not a PyTorch file"):
                open_tensors(file)
    for view, message in (
        ((20, (2, 3), (3, 1)), "extends beyond its storage"),
        ((8, (2, 3), (-3, 1)), "has an invalid shape"),
        ((0, 3, (1,)), "is damaged or not a PyTorch file"),
        ((0, (2.0,), (1,)), "has an invalid shape"),
        ((0, (5, 5), (0, 0)), "is larger than its storage"),
        ((0, (10**30,), (0,)), "is larger than its storage"),
    ):
        entries = {"x": Tensor(torch, "0", STORAGES["0"], *view)}
        write_zip(tmp_path / "beyond.pth", entries, STORAGES)
        with pytest.raises(UserError, match=message):
            open_tensors(tmp_path / "beyond.pth")
    with pytest.raises(UserError, match="there is no file"):
        open_tensors(tmp_path / "none.pth")


def test_written_tensors_can_be_read(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "a.weight": rng.random((3, 4), np.float32), "count": np.array(7, np.int64),
        "half": rng.random(5).astype(np.float16), "none": np.zeros((0, 3), np.float32),
        "turned": np.asfortranarray(rng.random((2, 5), np.float32)),
    }  # fmt: skip
    write_tensors(tmp_path / "m.ckpt", {"epoch": 3, "state_dict": state})
    loaded = open_tensors(tmp_path / "m.ckpt")
    assert loaded["epoch"] == 3 and list(loaded["state_dict"]) == list(state)
    for name, array in state.items():
        loaded_array = loaded["state_dict"][name]
        assert loaded_array.dtype == array.dtype and loaded_array.shape == array.shape
        np.testing.assert_array_equal(loaded_array, array)
    # torch.load(mmap=True) needs aligned arrays.
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        for part in archive.infolist():
            if "/data/" in part.filename:
                archive.fp.seek(part.header_offset + 26)
                lengths = struct.unpack("<HH", archive.fp.read(4))
                assert (part.header_offset + 30 + sum(lengths)) % 64 == 0
    assert not list(tmp_path.glob(".*"))


def test_a_flipped_bit_is_detected(torch, tmp_path):
    write_zip(tmp_path / "m.pth", make_content(torch), STORAGES)
    content_bytes = bytearray((tmp_path / "m.pth").read_bytes())
    start = content_bytes.index(STORAGES["0"].tobytes())
    content_bytes[start + 5] ^= 1
    (tmp_path / "m.pth").write_bytes(content_bytes)
    with pytest.raises(UserError, match=r"is damaged .*archive/data/0 has the wrong checksum"):
        open_tensors(tmp_path / "m.pth")


def test_a_file_may_refer_to_classes_of_lightning(tmp_path):
    name = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    for pickle_bytes in (b"\x80\x02}(" + name + b"K\x01u.", b"\x80\x02" + name + b")R."):
        with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
            archive.writestr("archive/data.pkl", pickle_bytes)
        open_tensors(tmp_path / "m.ckpt")


def test_a_compressed_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
    with pytest.raises(UserError, match="it is compressed"):
        open_tensors(tmp_path / "packed")


class Unusual:
    """An object whose pickle calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Settings(dict):
    """A dict type of a library that is not installed here."""


class Values(list):
    """A list type of a library that is not installed here."""


def test_other_objects_in_a_file_are_ignored(torch, tmp_path):
    """Reads a file with wrapped tensors and other objects that training scripts save."""
    executed = tmp_path / "executed"
    tensor = Tensor(torch, "0", STORAGES["0"], 0, (2,), (1,))
    rebuilt = [
        Unusual(sys.modules["torch._utils"]._rebuild_parameter_with_state, tensor, True, {}, {}),
        Unusual(
            sys.modules["torch._tensor"]._rebuild_from_type_v2,
            sys.modules["torch._utils"]._rebuild_tensor_v2, torch.Tensor,
            (StorageId(tensor), 0, (2,), (1,), False, collections.OrderedDict()), {},
        ),
    ]  # fmt: skip
    extras = {
        "args": argparse.Namespace(lr=0.1, path="x"), "scalar": np.float64(3), "set": {1, 2},
        "array": np.arange(3), "dtype": np.dtype("f4"), "counts": collections.Counter("aab"),
        "settings": Settings(a=1), "values": Values([1]), "function": print,
        "command": Unusual(os.system, f"touch {executed}"),
        "nested": Unusual(getattr, "text", "upper"),
        "default": collections.defaultdict(list, a=[1]), "frozen": frozenset({1}),
    }  # fmt: skip
    write_zip(tmp_path / "m.pt", {"model": {"w": tensor}, "rebuilt": rebuilt} | extras, STORAGES)
    content = open_tensors(tmp_path / "m.pt")
    np.testing.assert_array_equal(content["model"]["w"], [0, 1])
    for array in content["rebuilt"]:
        np.testing.assert_array_equal(array, [0, 1])
    assert not executed.exists() and isinstance(content["args"], Inert)


def test_tensors_of_types_that_numpy_lacks_are_inert(torch, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "u1", "Float8_e4m3fnStorage")
    monkeypatch.setattr(
        torch, "Float8_e4m3fnStorage", type("Float8_e4m3fnStorage", (), {"__module__": "torch"}),
        raising=False,
    )  # fmt: skip
    small = Tensor(torch, "9", np.arange(4, dtype=np.uint8), 0, (4,), (1,))
    content = {"model": {"w": Tensor(torch, "0", STORAGES["0"], 0, (2,), (1,))}, "optimizer": small}
    write_zip(tmp_path / "m.pt", content, STORAGES)
    loaded = open_tensors(tmp_path / "m.pt")
    np.testing.assert_array_equal(loaded["model"]["w"], [0, 1])
    assert isinstance(loaded["optimizer"], Inert)


def write_pickle(file, content):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return file


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}(" + b")" + b"\x85" * 500_000 + b"K\x01u.",  # deep tuple as a key
        b"\x80\x04(" + b")" + b"\x85" * 500_000 + b"\x91.",  # in a frozenset
        b"\x80\x02}()" + b"2\x86" * 40 + b"K\x01u.",  # a tuple that doubles its items
        b"\x80\x02Nr\x00\x00\x00\x40.",  # a memo of 16 GiB
    ],
)
def test_pickles_that_would_exhaust_the_process_are_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"too deeply|memo is too large"):
        open_tensors(write_pickle(tmp_path / "m.pt", content))


def test_pickles_cannot_change_what_restores_tensors(tmp_path):
    state = b"(N}(S'__defaults__'\n)ut"  # (None, {"__defaults__": ()})
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R"):
        open_tensors(write_pickle(tmp_path / "m.pt", b"\x80\x02" + name + state + b"b."))
    items = b"\x80\x02ccollections\nOrderedDict\n)R(N}(S'items'\nS'x'\nutb."
    assert open_tensors(write_pickle(tmp_path / "m.pt", items)).items() == {}.items()


def test_keys_that_are_not_names_are_ignored(tmp_path):
    number = b"\x80\x02}(\x8b" + struct.pack("<i", 3000) + b"\x01" * 3000 + b"K\x01"
    content = number + b"S'epoch'\nK\x03u."
    assert open_tensors(write_pickle(tmp_path / "m.pt", content))["epoch"] == 3
    with pytest.raises(UserError, match="has no state dict"):
        open_state_dict(tmp_path / "m.pt")
