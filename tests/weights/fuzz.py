"""Reads damaged checkpoint files: `python -m tests.weights.fuzz --files 200000 --seed 0`.

Every file must be read, or be refused with a UserError, in bounded time and memory, without
executing anything that the file names. The exit status is 0 if that holds for all files.
"""

import argparse
import collections
import contextlib
import io
import pickle
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import UserError
from taming_jax.interop import llamagen
from taming_jax.weights.state_dict import open_state_dict
from taming_jax.weights.torch_file import MAGIC
from tests.weights.torch_writer import (
    FullTensor,
    Global,
    StorageId,
    TensorPickler,
    write_tensors,
)

SECONDS = 5  # per file
MEMORY = 2**30  # bytes above what the process uses at the start
OPCODES = [code for code in vars(pickle).values() if isinstance(code, bytes) and len(code) == 1]
FORBIDDEN = ("exec", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "webbrowser.")
ALLOWED = ("os.scandir", "os.listdir")  # by the import system
GLOBALS = (
    b"cos\nsystem\n(S'touch executed'\ntR.",
    b"c__builtin__\neval\n(S'1/0'\ntR.",
    b"cposix\n_exit\n(I9\ntR.",
)


class LegacyPickler(TensorPickler):
    """Writes tensors as PyTorch did before version 1.6."""

    def persistent_id(self, value: Any) -> Any:
        names = super().persistent_id(value)
        return names and (*names, None)


def make_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of undamaged files of each format, by file name."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = {
        "encoder.conv_in.weight": (8, 3, 3, 3), "encoder.conv_out.weight": (8, 8, 3, 3),
        "encoder.conv_blocks.0.res.0.conv1.weight": (8, 8, 3, 3),
        "quantize.embedding.weight": (16, 8), "count": (),
    }  # fmt: skip
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    extras = {"steps": 7, "lr": 1e-4, "names": ["a", "b"], "args": {"set": {1, 2}, "none": None}}
    write_tensors(folder / "m.pt", {"model": arrays, "ema": arrays, **extras})
    save_file(arrays, folder / "m.safetensors", {"step": "7"})
    legacy = [MAGIC, 1001, {"little_endian": True}]
    storage = StorageId(Global("torch", "FloatStorage"), "0", 4)
    legacy += [{"model": {"x": FullTensor(storage, (2, 2))}, "step": 3}, ["0"]]
    stream = io.BytesIO()
    for value in legacy:
        LegacyPickler(stream, 2).dump(value)
    stream.write(struct.pack("<q", 4) + np.arange(4, dtype=np.float32).tobytes())
    averages = {f"model_ema.{name.replace('.', '')}": x for name, x in arrays.items()}
    write_tensors(folder / "a.pt", {"state_dict": arrays | averages})
    plain = io.BytesIO()
    pickle.dump({"model": {"x": [1, 2.5, "y"]}, "ordered": collections.OrderedDict(a=1)}, plain)
    return {
        "zip.pt": (folder / "m.pt").read_bytes(),
        "average.pt": (folder / "a.pt").read_bytes(),
        "legacy.pt": stream.getvalue(),
        "pickle.pt": plain.getvalue(),
        "m.safetensors": (folder / "m.safetensors").read_bytes(),
    }


def flip(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(0, len(content), rng.integers(1, 9)):
        changed[at] = rng.integers(256)
    return bytes(changed)


def cut(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    start, stop = sorted(rng.integers(0, len(content) + 1, 2))
    return content[:start] + content[stop:] if rng.random() < 0.5 else content[:stop]


def splice(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    other = others[rng.integers(len(others))]
    start, stop = sorted(rng.integers(0, len(other) + 1, 2))
    at = rng.integers(0, len(content) + 1)
    return content[:at] + other[start : min(stop, start + 200)] + content[at:]


def nest(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    """Repeats a part, which nests containers and grows numbers."""
    at, length = rng.integers(0, len(content)), rng.integers(1, 40)
    return content[:at] + content[at : at + length] * int(rng.integers(2, 2000)) + content[at:]


def insert_opcodes(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    at = rng.integers(0, len(content) + 1)
    codes = [OPCODES[i] for i in rng.integers(0, len(OPCODES), rng.integers(1, 6))]
    return content[:at] + b"".join(codes) + content[at:]


def insert_call(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    at = rng.integers(0, len(content) + 1)
    return content[:at] + GLOBALS[rng.integers(len(GLOBALS))] + content[at:]


MUTATIONS: list[Callable[[np.random.Generator, bytes, list[bytes]], bytes]] = [
    flip, cut, splice, nest, insert_opcodes, insert_call,
]  # fmt: skip


def mutate_member(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    """Mutates a file in a zip and packs it again, so that its checksum is right."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(output, "w") as target:
        names = source.namelist()
        chosen = "archive/data.pkl" if rng.random() < 0.8 else names[rng.integers(len(names))]
        for name in names:
            part = source.read(name)
            if name == chosen and part:
                part = MUTATIONS[rng.integers(len(MUTATIONS))](rng, part, others)
            target.writestr(name, part)
    return output.getvalue()


def iterate_damaged(folder: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields the names and contents of damaged files, without end."""
    files = make_files(folder)
    rng, names, contents = np.random.default_rng(seed), list(files), list(files.values())
    while True:
        name = names[rng.integers(len(names))]
        content = files[name]
        for _ in range(rng.integers(1, 4)):
            is_zip = (
                name in ("zip.pt", "average.pt") and content == files[name] and rng.random() < 0.8
            )
            mutation = mutate_member if is_zip else MUTATIONS[rng.integers(len(MUTATIONS))]
            content = mutation(rng, content, contents) if content else content
        yield name, content


def fuzz(count: int, seed: int) -> list[str]:
    """Reads `count` damaged files and returns a line for each that was not handled."""
    failures: list[str] = []
    watched: list[str] = []
    active = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event.startswith(FORBIDDEN) and event not in ALLOWED:
            watched.append(event)

    def time_out(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    sys.addaudithook(audit)
    previous = signal.signal(signal.SIGALRM, time_out)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        damaged = iterate_damaged(folder, seed)
        for file in ("zip.pt", "m.safetensors"):  # imports what reading needs
            (folder / file).write_bytes(make_files(folder)[file])
            llamagen.parse_tokenizer(file, open_state_dict(folder / file)[0])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
        try:
            for i in range(count):
                kind, content = next(damaged)
                (folder / kind).write_bytes(content)
                signal.alarm(SECONDS)
                active = True
                try:
                    with contextlib.redirect_stdout(None):
                        arrays, _ = open_state_dict(folder / kind)
                    llamagen.parse_tokenizer(folder / kind, arrays)
                    outcomes["read"] += 1
                except UserError as error:
                    outcomes["refused"] += 1
                    if "\n" in str(error):
                        failures.append(f"{kind} {i}: a message of several lines: {error}")
                except BaseException as error:  # noqa: BLE001 - that is what is tested
                    failures.append(f"{kind} {i}: {type(error).__name__}: {error}")
                finally:
                    active = False
                    signal.alarm(0)
                if watched:
                    failures.append(f"{kind} {i}: {', '.join(watched)}")
                    watched.clear()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            signal.signal(signal.SIGALRM, previous)
    print(", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())))
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    failures = fuzz(args.files, args.seed)
    print("\n".join(failures[:50]))
    print(f"{args.files} files, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
