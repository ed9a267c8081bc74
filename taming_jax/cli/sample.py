"""Draws new images of classes from a run of both stages, or completes given ones.

    taming-jax sample --workdir runs/mnist --classes 0 1 2 --per-class 8 --out grid.png
    taming-jax sample --workdir runs/birds --size 512x384 --per-class 1 --out wide.png
    taming-jax sample --workdir runs/birds --complete bird.jpg --keep top --out rest.png

`--out` says what is written: FILE.npz (`images` uint8 [n,h,w,c], `labels` int32 [n]), FILE.png (a
labelled grid, one row per class), or a folder (one PNG per image). By default images are drawn as
the run's preset says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tyro

from taming_jax.cli.arguments import check_output, join_processes, parse
from taming_jax.errors import RunFailed, UserError
from taming_jax.files import check_writable
from taming_jax.parallel.distributed import Processes

if TYPE_CHECKING:
    from taming_jax.run import Run

ROWS = 10  # of a grid, unless its classes are named


@dataclass(frozen=True, kw_only=True)
class Sample(Processes):
    workdir: Path
    """The run's folder."""
    out: Path
    """FILE.npz, FILE.png, or a folder."""
    classes: tuple[str, ...] = ()
    """Numbers or names. Default: all, or 10 of them for a grid."""
    per_class: int = 8
    """How many images of each class."""
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """How many of the most likely codes are drawn from."""
    top_p: float | None = None
    """The share of probability that the codes that are drawn from have."""
    guidance_scale: tuple[float, ...] = ()
    """1 is none, 2 is much; two numbers are the first code's and the last's."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, larger than the training images: drawn in windows as large."""
    complete: tuple[str, ...] = ()
    """Pictures whose rest is drawn, --per-class times each; --classes are theirs, one of all or one
    of each."""
    keep: str | None = None
    """What to keep of them: top, the upper half (the default), or a share."""
    mask: Path | None = None
    """In place of --keep: a picture that is white where pixels are kept."""
    seed: int = 0
    devices: int | None = None
    """How many to use. Default: all."""
    batch_size: int | None = None
    """Images in flight, which bounds memory; the images do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Complete(Sample):
    complete: tyro.conf.Positional[tuple[str, ...]]
    """Pictures whose rest is drawn, --per-class times each; --classes are theirs, one of all or one
    of each."""


def size_of(text: str) -> tuple[int, int]:
    """HEIGHT, WIDTH of WIDTHxHEIGHT. UserError for what is none."""
    wide, _, high = text.partition("x")
    if not (wide.isdecimal() and high.isdecimal() and int(wide) and int(high)):
        raise UserError(f"--size {text} is not WIDTHxHEIGHT, such as 512x384.")
    return int(high), int(wide)


def share_of(text: str | None) -> float:
    """A share of the rows from the top. UserError for what is none."""
    if text in (None, "top"):
        return 0.5
    try:
        return float(str(text))
    except ValueError:
        raise UserError(f"--keep {text} is neither top nor a share.") from None


class Drawn(NamedTuple):
    """Images uint8 [n,h,w,c], as many of each row, their classes int32 [n], what a row is called
    and what its files are, and the picture it begins with, [rows,h,w,c], where there is one."""

    images: np.ndarray
    labels: np.ndarray
    rows: list[str]
    files: list[str]
    given: np.ndarray | None = None


def write_folder(out: Path, drawn: Drawn) -> None:
    """One PNG an image, named by its row and its place in it."""
    from PIL import Image

    out.mkdir(exist_ok=True)
    each = len(drawn.images) // len(drawn.files)
    for i, image in enumerate(drawn.images):
        place = out / f"{drawn.files[i // each]}_{i % each:05d}.png"
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(place)


def complete() -> None:
    given = parse(Complete, __doc__)
    if not given.complete:
        raise UserError("name the pictures to complete.")
    work(given)


def main() -> None:
    work(parse(Sample, __doc__))


def work(given: Sample) -> None:
    from taming_jax.parallel import distributed

    join_processes(given, own=("process_id", "workdir", "out"))
    size = None if given.size is None else size_of(given.size)
    out, kind = distributed.from_first(lambda: place_of(given))
    from taming_jax.data.datasets import spread
    from taming_jax.data.pixels import to_uint8
    from taming_jax.run import load_run

    run = load_run(given.workdir)
    settings = {
        "temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p,
        "guidance_scale": given.guidance_scale or None, "size": size, "seed": given.seed,
        "devices": given.devices, "batch_size": given.batch_size, "progress": True,
    }  # fmt: skip
    if given.complete:
        drawn = completed(run, given, settings)
        said = f"{len(drawn.images)} completions of {len(drawn.rows)} pictures are in {out}."
    else:
        known = len(run.class_names)
        unless_told = spread(known, ROWS if kind == ".png" else known)
        asked = run.labels(given.classes or unless_told)
        classes = list(dict.fromkeys(asked.tolist()))  # each once
        images = run.sample(classes, given.per_class, **settings)
        names = [run.class_names[i] for i in classes]
        labels = np.repeat(np.array(classes, np.int32), given.per_class)
        drawn = Drawn(to_uint8(images), labels, names, [f"{i:04d}" for i in classes])
        said = f"{len(images)} images of {len(classes)} classes are in {out}."
        if not given.classes and len(classes) < known:
            said += f"\nThere are {known} classes; --classes names others."
    # The others wait: one that was long alone would be taken for lost.
    distributed.from_first(lambda: write(out, kind, drawn))
    print(said)


def completed(run: "Run", given: Sample, settings: dict[str, Any]) -> Drawn:
    """The completions of the given pictures, which the first of several processes reads. UserError
    for those that cannot be read."""
    from taming_jax.data.pixels import to_uint8
    from taming_jax.parallel import distributed

    config = run.config.data
    size = settings.pop("size") or (config.image_size, config.image_size)
    files = [Path(name) for name in given.complete]

    def read() -> tuple[np.ndarray, np.ndarray | None]:
        pictures = np.stack([picture(file, size, config.channels) for file in files])
        if given.mask is None:
            return pictures, None
        return pictures, picture(given.mask, size, 1)[..., 0] > 127

    pictures, mask = distributed.from_first(read)
    classes = given.classes or None
    keep = share_of(given.keep)
    images = run.complete(pictures, classes, given.per_class, keep=keep, mask=mask, **settings)
    of_each = np.full(len(pictures), -1) if classes is None else run.labels(classes)
    labels = np.repeat(np.broadcast_to(of_each, len(pictures)), given.per_class)
    rows = [file.stem for file in files]
    names = [f"{i:04d}_{row}" for i, row in enumerate(rows)]
    return Drawn(to_uint8(images), labels.astype(np.int32), rows, names, pictures)


def picture(file: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """The middle of a picture, uint8 [h,w,c] of a size."""
    from taming_jax.data.images import decode

    try:
        return decode(file.read_bytes(), size, channels, squeeze=False)
    except FileNotFoundError:
        raise UserError(f"there is no picture {file}.") from None
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{file} cannot be read as a picture; name a whole one.") from error


def place_of(given: Sample) -> tuple[Path, str]:
    """Where the images go, and the suffix that says how: .npz, .png, or none for a folder.
    UserError where they cannot."""
    out = given.out
    kind = "" if out.is_dir() else out.suffix
    if kind:
        check_output("--out", out, [".npz", ".png"])
    elif out.is_file():
        raise UserError(f"--out {out} is a file; name a folder, a .npz or a .png.")
    else:
        check_writable("--out", out)
    if given.per_class < 1:
        raise UserError(f"--per-class is {given.per_class}; it must be 1 or more.")
    if not given.complete and (given.keep is not None or given.mask is not None):
        raise UserError(
            "--keep and --mask are for pictures that are completed; name some with --complete."
        )
    if given.keep is not None and given.mask is not None:
        raise UserError("--keep and --mask both say what is kept; leave one out.")
    if given.batch_size is not None and given.batch_size < 1:
        raise UserError(f"--batch-size is {given.batch_size}; it must be 1 or more.")
    return out, kind


def write(out: Path, kind: str, drawn: Drawn) -> None:
    """Writes what was drawn."""
    from taming_jax.figures import labelled_grid, save

    each = len(drawn.images) // len(drawn.rows)
    try:
        if kind == ".npz":
            np.savez_compressed(out, images=drawn.images, labels=drawn.labels)
        elif kind == ".png":
            images, below = drawn.images, []
            if drawn.given is not None:
                rows = images.reshape(len(drawn.rows), each, *images.shape[1:])
                images = np.concatenate([drawn.given[:, None], rows], 1)
                images, each = images.reshape(-1, *images.shape[2:]), each + 1
                below = ["given", *[""] * (each - 1)]
            save(labelled_grid(images, drawn.rows, each, below=below), out)
        else:
            write_folder(out, drawn)
    except OSError as error:
        raise RunFailed(f"{out} could not be written: {error.strerror or error}.") from error
