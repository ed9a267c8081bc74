"""A dataset as grids of codes, encoded once and kept beside the checkpoints.

`tokens/KEY/SPLIT/` holds an encoded split in files of some thousand images each. KEY is made of the
generator's arrays and the images themselves, so a file of another generator or of other images is
never read; a file's name carries the hash of its content, so a damaged one is encoded again, and an
encoding that was stopped goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from taming_jax.data.feeds import ResidentFeed, take, to_float
from taming_jax.data.sources import Split
from taming_jax.models.vqgan import VQGAN, encode
from taming_jax.train.devices import Devices
from taming_jax.train.store import digest, named_arrays

FILE = 4096  # images a file


def key_of(params: Any, images: np.ndarray) -> str:
    """A name for what a generator makes of some images."""
    arrays = named_arrays(params)
    parts = ["/".join(path) + digest(np.asarray(arrays[path])) for path in sorted(arrays)]
    return hashlib.sha256("".join([*parts, digest(images)]).encode()).hexdigest()[:16]


def smallest_unsigned(codebook_size: int) -> np.dtype:
    """The narrowest unsigned integers that hold every code."""
    return np.min_scalar_type(codebook_size - 1)


def encoded(
    folder: Path,
    name: str,
    split: Split,
    model: VQGAN,
    params: Any,
    devices: Devices,
    say: Callable[[str], None] = print,
) -> Split:
    """A split with its images as codes, unsigned [n, h' * w'] in raster order: read from `folder`
    (a run's tokens/), or encoded into it. Products are computed at the highest precision."""
    place = folder / key_of(params, split.images) / name
    dtype = smallest_unsigned(model.quantizer.codebook_size)
    starts = range(0, len(split.images), FILE)
    kept = {start: read(place, start, dtype, say) for start in starts}
    missing = [start for start in starts if kept[start] is None]
    if missing:
        place.mkdir(parents=True, exist_ok=True)
        size = 256 * len(devices)

        def one_batch(params: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                indices = encode(model, params, to_float(take(arrays)[0])).indices
            return indices.reshape(len(indices), -1)

        compiled, on_devices = devices.compile(one_batch), devices.replicate(params)
        for start in tqdm(missing, desc=f"encoding {name}", unit="file", disable=None):
            part = Split(*(x[start : start + FILE] for x in split))
            batches = ResidentFeed(part, size, 0, devices).once()
            codes = [devices.gather(compiled(on_devices, b.arrays)) for b in batches]
            kept[start] = write(place, start, np.concatenate(codes)[: len(part.images)], dtype)
    return Split(np.concatenate([kept[start] for start in starts]), split.labels)


def write(place: Path, start: int, codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    codes = codes.astype(dtype)
    partial = place / f".{start:08d}.partial"
    with partial.open("wb") as file:
        np.save(file, codes)
    for old in place.glob(f"{start:08d}-*.npy"):
        old.unlink()
    partial.replace(place / f"{start:08d}-{digest(codes)[:16]}.npy")
    return codes


def read(place: Path, start: int, dtype: np.dtype, say: Callable[[str], None]) -> np.ndarray | None:
    """The codes of the file that begins at image `start`; None where it is missing or damaged."""
    for file in place.glob(f"{start:08d}-*.npy"):
        try:
            codes = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            codes = np.empty(0)
        if codes.dtype == dtype and file.stem.endswith(digest(codes)[:16]):
            return codes
        say(f"The token file {file} is damaged; its images are encoded again.")
    return None


def write_class_names(folder: Path, names: tuple[str, ...]) -> None:
    """Notes the names of the classes in a run's folder, which then needs no data to be sampled."""
    partial = folder / ".class_names.partial"
    partial.write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / "class_names.json")


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """What `write_class_names` noted; None where it is missing or damaged."""
    try:
        return tuple(json.loads((folder / "class_names.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
