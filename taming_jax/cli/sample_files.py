"""Writes samples to a folder or an .npz file while they are drawn. Memory does not grow with their
number, and a command that was interrupted continues when it is repeated.

A manifest holds what the images depend on, so that images drawn with different settings are not
mixed."""

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from taming_jax.errors import UserError
from taming_jax.storage import atomic_file, atomic_write

MANIFEST = "samples.json"


def check_manifest(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError if a folder holds images of other settings, or without a manifest."""
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if any(folder.glob("*.png")):
            raise UserError(f"{folder} holds other pictures; choose an empty folder.") from error
        return
    except ValueError:
        written = {}
    current = json.loads(json.dumps(settings))  # JSON turns tuples into lists
    differing = [name for name, value in current.items() if written.get(name) != value]
    if differing:
        raise UserError(
            f"the images in {folder} were drawn with other settings ({', '.join(differing)}, see "
            f"{MANIFEST}); use those, choose another --out, or delete the folder."
        )


def write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the manifest of a folder if it has none. Raises OSError."""
    if not (folder / MANIFEST).is_file():
        atomic_write(folder / MANIFEST, json.dumps(settings, indent=1).encode())


class SampleFiles(Protocol):
    """The files that images are written to, in `folder`."""

    folder: Path

    def find_missing(self) -> np.ndarray:
        """Returns the numbers of the images that are not written yet, in ascending order."""
        ...

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Writes the images number `rows`, uint8 [m,h,w,c]. Raises OSError."""
        ...

    def finish(self) -> None:
        """Completes the files when all images are written. Raises OSError."""
        ...


class PngFolder:
    """A folder with one PNG per image."""

    def __init__(self, out: Path, names: list[str]):
        self.folder, self.names = out, names

    def find_missing(self) -> np.ndarray:
        written = {file.stem for file in self.folder.glob("*.png")}
        return np.array([i for i, name in enumerate(self.names) if name not in written], int)

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        for row, image in zip(rows.tolist(), images, strict=True):
            partial = self.folder / ".partial"
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                partial, "PNG"
            )
            partial.replace(self.folder / f"{self.names[row]}.png")

    def finish(self) -> None:
        """Nothing is left to write."""


class NpzFile:
    """An .npz file. Until it is complete, the images are in a folder next to it."""

    def __init__(self, out: Path, labels: np.ndarray, shape: tuple[int, ...]):
        """`shape` is that of an image, (h, w, c)."""
        self.out, self.labels, self.shape = out, labels, shape
        self.folder = out.with_name(f"{out.name}.partial")
        self.images = self.folder / "images.u8"

    def find_missing(self) -> np.ndarray:
        size = self.images.stat().st_size if self.images.is_file() else 0
        return np.arange(size // math.prod(self.shape), len(self.labels))

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        self.images.touch()
        with self.images.open("r+b") as file:
            file.seek(int(rows[0]) * math.prod(self.shape))  # overwrites an image that was cut off
            file.write(images.tobytes())

    def finish(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.labels), *self.shape)}
        with (
            atomic_file(self.out) as partial,
            zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            with archive.open("images.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_2_0(member, header)
                with self.images.open("rb") as images:
                    shutil.copyfileobj(images, member, 2**24)
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, self.labels)
        shutil.rmtree(self.folder)
