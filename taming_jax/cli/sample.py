"""Draws new images of classes from a run of both stages, or completes given ones.

    taming-jax sample --workdir runs/mnist --classes 0 1 2 --per-class 8 --out grid.png
    taming-jax sample --workdir runs/birds --size 512x384 --per-class 1 --out wide.png
    taming-jax sample --workdir runs/birds --complete bird.jpg --keep top --out rest.png

`--out` says what is written: FILE.npz (`images` uint8 [n,h,w,c], `labels` int32 [n]), FILE.png (a
labelled grid, one row per class), or a folder (one PNG per image). By default images are drawn as
the run's preset says.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tyro

from taming_jax.cli.arguments import check_output, parse
from taming_jax.errors import RunFailed, UserError
from taming_jax.files import check_writable

if TYPE_CHECKING:
    from taming_jax.run import Run

ROWS = 10  # of a grid, unless its classes are named


@dataclass(frozen=True, kw_only=True)
class Sample:
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
    keep: float | Literal["top"] | None = None
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
    """Draws the rest of given pictures, by a run of both stages.

        taming-jax complete bird.jpg --workdir runs/birds --keep top --out rest.png

    `--out` is FILE.npz, FILE.png or a folder, as for `taming-jax sample`.
    """

    complete: tyro.conf.Positional[tuple[str, ...]]
    """Pictures whose rest is drawn, --per-class times each; --classes are theirs, one of all or one
    of each."""


def size_of(text: str) -> tuple[int, int]:
    """HEIGHT, WIDTH of WIDTHxHEIGHT. UserError for what is none."""
    wide, _, high = text.partition("x")
    if not (wide.isdecimal() and high.isdecimal() and int(wide) and int(high)):
        raise UserError(f"--size {text} is not WIDTHxHEIGHT, such as 512x384.")
    return int(high), int(wide)


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
    given = parse(Complete, inspect.cleandoc(Complete.__doc__ or ""))
    if not given.complete:
        raise UserError("name the pictures to complete.")
    work(given)


def main() -> None:
    work(parse(Sample, __doc__))


def work(given: Sample) -> None:
    size = None if given.size is None else size_of(given.size)
    kind = check_place(given)
    from taming_jax.run import load_run

    run = load_run(given.workdir)
    settings = {
        "temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p,
        "guidance_scale": given.guidance_scale or None, "seed": given.seed,
        "devices": given.devices, "batch_size": given.batch_size, "progress": True,
    }  # fmt: skip
    if given.complete:
        drawn = complete_pictures(run, given, size, settings)
        summary = f"{len(drawn.images)} completions of {len(drawn.rows)} pictures"
    else:
        drawn = sample_classes(run, given, ROWS if kind == ".png" else None, size=size, **settings)
        summary = f"{len(drawn.images)} images of {len(drawn.rows)} classes"
    write(given.out, kind, drawn)
    print(f"{summary} are in {given.out}.")
    if not given.complete and not given.classes and len(drawn.rows) < len(run.class_names):
        print(f"There are {len(run.class_names)} classes; --classes names others.")


def sample_classes(run: "Run", given: Sample, most: int | None, **settings: Any) -> Drawn:
    """New images of the given classes, each class once, or of all or at most so many."""
    from taming_jax.data.datasets import spread
    from taming_jax.data.pixels import to_uint8

    count = len(run.class_names)
    numbers = run.labels(given.classes or spread(count, most or count))
    classes = list(dict.fromkeys(numbers.tolist()))
    images = run.sample(classes, given.per_class, **settings)
    labels = np.repeat(np.array(classes, np.int32), given.per_class)
    names = [run.class_names[i] for i in classes]
    return Drawn(to_uint8(images), labels, names, [f"{i:04d}" for i in classes])


def complete_pictures(
    run: "Run", given: Sample, size: tuple[int, int] | None, settings: dict[str, Any]
) -> Drawn:
    """The completions of the given pictures. UserError for those that cannot be read."""
    from taming_jax.data.pixels import to_uint8

    config, files = run.config.data, [Path(name) for name in given.complete]
    shape = size or (config.image_size, config.image_size)

    pictures = np.stack([picture(file, shape, config.channels) for file in files])
    mask = None if given.mask is None else picture(given.mask, shape, 1)[..., 0] > 127
    classes = given.classes or None
    keep = given.keep if isinstance(given.keep, float) else 0.5
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


def check_place(given: Sample) -> str:
    """The suffix of --out, which says how images are written: .npz, .png, or none for a folder.
    UserError where they cannot be, and for flags that contradict each other."""
    out = given.out
    kind = "" if out.is_dir() else out.suffix
    if kind:
        check_output("--out", out, [".npz", ".png"])
    elif out.is_file():
        raise UserError(f"--out {out} is a file; name a folder, a .npz or a .png.")
    else:
        check_writable("--out", out)
    if not given.complete and (given.keep is not None or given.mask is not None):
        raise UserError(
            "--keep and --mask are for pictures that are completed; name some with --complete."
        )
    if given.keep is not None and given.mask is not None:
        raise UserError("--keep and --mask both say what is kept; leave one out.")
    return kind


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
