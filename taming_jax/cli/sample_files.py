"""Writes samples to a folder or an .npz file while they are drawn. Memory does not grow with their
number, and a command that was interrupted continues when it is repeated.

A manifest holds what the images depend on, so that images of other settings are not mixed.
"""

import contextlib
import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
from PIL import Image

from taming_jax.errors import UserError
from taming_jax.storage import atomic_file, atomic_write

MANIFEST = "samples.json"


class SampleFiles(Protocol):
    """Images of classes `labels` int32 [n], image number `numbers` int32 [n] of its class."""

    def find_missing(self, labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Returns the indices of the images that are not written yet. Raises UserError if there are
        images that were drawn with other settings."""
        ...

    def write(self, labels: np.ndarray, numbers: np.ndarray, images: np.ndarray) -> None:
        """Writes the next images, uint8 [m,h,w,c]. Raises OSError."""
        ...

    def finish(self, labels: np.ndarray) -> None:
        """Completes the files when all images are written. Raises OSError."""
        ...


@contextlib.contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Raises UserError if another command writes to the same files."""
    file = out.absolute().with_name(f".{out.absolute().name}.lock")
    lock = filelock.FileLock(file, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"another command writes to {out}; wait for it, or choose another --out."
        ) from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            file.unlink()


def check_manifest(file: Path, settings: dict[str, Any], images: str) -> None:
    """Raises UserError if a manifest exists and holds other settings. `images` names the images
    that it describes."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        written = {}
    current = json.loads(json.dumps(settings))  # JSON turns tuples into lists
    differing = [name for name, value in current.items() if written.get(name) != value]
    if differing:
        raise UserError(
            f"{images} were drawn with other settings ({', '.join(differing)}, see {file.name}); "
            "use those, choose another --out, or delete these files."
        )


class PngFolder:
    """A folder with one PNG per image, named after its class and its number."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.settings = out, settings

    def find_missing(self, labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        written = {file.name for file in self.out.glob("*.png")}
        if written and not (self.out / MANIFEST).is_file():
            raise UserError(f"{self.out} holds other pictures; choose an empty folder.")
        check_manifest(self.out / MANIFEST, self.settings, f"the images in {self.out}")
        pairs = enumerate(zip(labels.tolist(), numbers.tolist(), strict=True))
        return np.array([i for i, pair in pairs if self._name(*pair) not in written], int)

    def write(self, labels: np.ndarray, numbers: np.ndarray, images: np.ndarray) -> None:
        self.out.mkdir(exist_ok=True)
        if not (self.out / MANIFEST).is_file():
            atomic_write(self.out / MANIFEST, json.dumps(self.settings, indent=1).encode())
        for label, number, image in zip(labels.tolist(), numbers.tolist(), images, strict=True):
            partial = self.out / ".partial"
            pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
            Image.fromarray(pixels).save(partial, "PNG")
            partial.replace(self.out / self._name(label, number))

    def finish(self, labels: np.ndarray) -> None:
        """Nothing is left to write."""

    @staticmethod
    def _name(label: int, number: int) -> str:
        return f"{label:04d}_{number:05d}.png"


class NpzFile:
    """An .npz file. Until it is complete, the images are in a scratch file next to it."""

    def __init__(self, out: Path, settings: dict[str, Any], shape: tuple[int, ...]):
        """`shape` is that of an image, (h, w, c)."""
        self.out, self.settings, self.shape = out, settings, shape
        self.scratch = out.with_name(f"{out.name}.partial")
        self.manifest = out.with_name(f"{out.name}.partial.json")
        self._written = 0  # images in the scratch file

    def find_missing(self, labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        images = f"the images of an interrupted command in {self.scratch}"
        check_manifest(self.manifest, self.settings, images)
        if self.manifest.is_file() and self.scratch.is_file():
            self._written = self.scratch.stat().st_size // math.prod(self.shape)
        return np.arange(self._written, len(labels))

    def write(self, labels: np.ndarray, numbers: np.ndarray, images: np.ndarray) -> None:
        if not self._written:
            self.scratch.write_bytes(b"")
            atomic_write(self.manifest, json.dumps(self.settings, indent=1).encode())
        with self.scratch.open("r+b") as file:
            file.seek(self._written * math.prod(self.shape))  # over an image that was cut off
            file.write(images.tobytes())
        self._written += len(images)

    def finish(self, labels: np.ndarray) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *self.shape)}
        with (
            atomic_file(self.out) as partial,
            zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            with archive.open("images.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_2_0(member, header)
                with self.scratch.open("rb") as images:
                    shutil.copyfileobj(images, member, 2**24)
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, labels)
        self.scratch.unlink()
        self.manifest.unlink()
