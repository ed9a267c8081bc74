"""Draws new images from a run of both stages, or completes pictures.

    taming-jax sample --workdir runs/mnist --classes 0 1 2 --per-class 8 --out grid.png
    taming-jax sample --workdir runs/birds --size 512x384 --per-class 1 --out wide.png
    taming-jax sample --workdir runs/birds --complete bird.jpg --keep top --out rest.png

`--out` determines the format: FILE.npz (`images` uint8 [n,h,w,c], `labels` int32 [n]), FILE.png (a
labeled grid, one row per class), or a folder (one PNG per image). The sampling settings default to
those of the run.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tyro

from taming_jax.cli.arguments import check_output, parse
from taming_jax.config.sampling import SamplingSettings
from taming_jax.errors import RunFailed, UserError
from taming_jax.storage import check_writable, expand_user, folder_lock

if TYPE_CHECKING:
    from taming_jax.run import Run
    from taming_jax.sampler import Drawing

MAX_ROWS = 10  # in a grid, if --classes is not set


@dataclass(frozen=True, kw_only=True)
class Output:
    workdir: Path
    """The run's folder."""
    out: Path
    """The FILE.npz, FILE.png or folder to write."""
    classes: tuple[str, ...] = ()
    """Class numbers or names. Default: all that have training images (at most 10 in
    a grid), or none for completions."""
    per_class: int = 8
    """The number of images per class, or of completions per picture."""


@dataclass(frozen=True, kw_only=True)
class Sample(SamplingSettings, Output):
    size: str | None = None
    """WIDTHxHEIGHT in pixels, at least the training size. Larger images are drawn in windows."""
    complete: tuple[str, ...] = ()
    """Pictures to complete, --per-class times each. Give one class for all, or one per picture."""
    keep: float | Literal["top"] | None = None
    """The part of the pictures to keep: top for the upper half (the default), or the
    fraction of rows to keep from the top."""
    mask: Path | None = None
    """Instead of --keep: a picture that is white where pixels are kept."""
    devices: int | None = None
    """The number of devices to use. Default: all."""
    batch_size: int | None = None
    """The number of images to draw before the first ones are fetched. Default: one micro-batch per
    device. The next one is drawn in the meantime. It does not affect the images."""


@dataclass(frozen=True, kw_only=True)
class Complete(Sample):
    """Completes pictures with a run of both stages.

        taming-jax complete bird.jpg --workdir runs/birds --keep top --out rest.png

    `--out` is FILE.npz, FILE.png or a folder, as for `taming-jax sample`. The sampling settings
    default to those of the run.
    """

    complete: tyro.conf.Positional[tuple[str, ...]]
    """Pictures to complete, --per-class times each. Give one class for all, or one per picture."""


def parse_size(text: str) -> tuple[int, int]:
    """Parses WIDTHxHEIGHT into height and width. Raises UserError if the text is invalid."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"--size {text} is invalid; write WIDTHxHEIGHT, such as 512x384.")
    return int(height), int(width)


class Plan(NamedTuple):
    """Images to draw, row by row, and their classes int32 [n] (-1: no class). Each row has a title,
    a prefix for its file names and, if it completes a picture, that picture: `originals` uint8
    [rows,h,w,c]."""

    drawing: "Drawing"
    labels: np.ndarray
    titles: list[str]
    prefixes: list[str]
    originals: np.ndarray | None = None


def complete() -> None:
    args = parse(Complete, inspect.cleandoc(Complete.__doc__ or ""))
    if not args.complete:
        raise UserError("name the pictures to complete.")
    draw_and_write(args)


def main() -> None:
    draw_and_write(parse(Sample, __doc__))


def draw_and_write(args: Sample) -> None:
    """Draws images as the flags specify, and writes them."""
    size = None if args.size is None else parse_size(args.size)
    suffix = check_flags(args)
    from taming_jax.run import load_run

    run = load_run(args.workdir)
    settings = args.sampling
    how: dict[str, Any] = {"devices": args.devices, "batch_size": args.batch_size, "progress": True}
    if args.complete:
        plan = plan_completions(run, args, size)
    else:
        plan = plan_samples(run, args, size, MAX_ROWS if suffix == ".png" else None)
    try:
        if suffix == ".png":
            write_grid(args.out, plan, run.sampler.draw(plan.drawing, **settings, **how))
        else:
            draw_to_files(run, args.out, plan, settings, how)
    except OSError as error:
        raise RunFailed(f"{args.out} could not be written: {error.strerror or error}.") from error
    n, rows = len(plan.labels), len(plan.titles)
    if args.complete:
        what = f"{n} completion{'s' * (n > 1)} of {rows} picture{'s' * (rows > 1)}"
    else:
        what = f"{n} image{'s' * (n > 1)} of {rows} class{'es' * (rows > 1)}"
    print(f"Wrote {what} to {args.out}.")
    if not args.complete and not args.classes and rows < len(run.class_names):
        print(f"There are {len(run.class_names)} classes; choose others with --classes.")


def plan_samples(run: "Run", args: Sample, size: tuple[int, int] | None, limit: int | None) -> Plan:
    """Plans images of --classes, without duplicates. Default: the classes with training images, or
    at most `limit` of them, evenly spaced."""
    from taming_jax.data.datasets import evenly_spaced

    classes: Any = list(dict.fromkeys(run.to_labels(args.classes).tolist()))
    if not classes:
        trained = run.trained_classes
        classes = [trained[i] for i in evenly_spaced(len(trained), limit or len(trained))]
    drawing = run.sampler.plan_samples(classes, args.per_class, size=size)
    names = [run.class_names[i] for i in classes]
    return Plan(drawing, drawing.labels, names, [f"{i:04d}" for i in classes])


def plan_completions(run: "Run", args: Sample, size: tuple[int, int] | None) -> Plan:
    """Plans completions of the pictures of --complete. Raises UserError if one cannot be read."""
    config, files = run.config.data, [expand_user(name) for name in args.complete]
    shape = size or (config.image_size, config.image_size)
    pictures = np.stack([read_picture(file, shape, config.channels) for file in files])
    mask = None if args.mask is None else read_picture(args.mask, shape, 1)[..., 0] > 127
    keep = args.keep if isinstance(args.keep, float) else 0.5
    drawing = run.sampler.plan_completions(
        run.encode(pictures), args.classes or None, args.per_class, keep, mask
    )
    labels = drawing.labels if args.classes else np.full(len(drawing.labels), -1, np.int32)
    titles = [file.stem for file in files]
    prefixes = [f"{i:04d}_{title}" for i, title in enumerate(titles)]
    return Plan(drawing, labels, titles, prefixes, pictures)


def write_grid(out: Path, plan: Plan, batches: Iterable[np.ndarray]) -> None:
    """Writes a grid of all images, with the pictures that they complete."""
    from taming_jax.data.pixels import to_uint8
    from taming_jax.figures import draw_grid, save

    images, below = to_uint8(np.concatenate(list(batches))), []
    columns = len(images) // len(plan.titles)
    if plan.originals is not None:
        rows = images.reshape(len(plan.titles), columns, *images.shape[1:])
        images = np.concatenate([plan.originals[:, None], rows], 1)
        images, columns = images.reshape(-1, *images.shape[2:]), columns + 1
        below = ["original", *[""] * (columns - 1)]
    save(draw_grid(images, plan.titles, columns, below=below), out)


def draw_to_files(
    run: "Run", out: Path, plan: Plan, settings: dict[str, Any], how: dict[str, Any]
) -> None:
    """Draws images and writes them as they are drawn, except those that already exist."""
    from taming_jax.cli.sample_files import (
        NpzFile,
        PngFolder,
        SampleFiles,
        check_manifest,
        write_manifest,
    )
    from taming_jax.data.pixels import to_uint8
    from taming_jax.weights.arrays import hash_arrays

    config, drawing = run.config.data, plan.drawing
    shape = (*(drawing.size or (config.image_size, config.image_size)), config.channels)
    sampling = run.sampler.resolve_settings(**settings)
    manifest = {
        "weights": run.hash_weights(), **sampling, "seed": settings["seed"],
        "shape": shape,
    }  # fmt: skip
    if plan.originals is not None or out.suffix == ".npz":  # all images together, in their order
        manifest["images"] = hash_arrays([x for x in drawing[:3] if x is not None])
    per_row = len(plan.labels) // len(plan.prefixes)
    names = [f"{plan.prefixes[i // per_row]}_{n:05d}" for i, n in enumerate(drawing.numbers)]
    is_npz = out.suffix == ".npz" and not out.is_dir()
    files: SampleFiles = NpzFile(out, plan.labels, shape) if is_npz else PngFolder(out, names)
    with folder_lock(files.folder, "drawing images", "--out"):
        check_manifest(files.folder, manifest)
        missing = files.find_missing()
        if len(missing) < len(names):
            print(f"{len(names) - len(missing)} of {len(names)} images have already been drawn.")
        for images in run.sampler.draw(drawing.select(missing), **settings, **how):
            write_manifest(files.folder, manifest)
            files.write(missing[: len(images)], to_uint8(images))
            missing = missing[len(images) :]
        files.finish()


def read_picture(file: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """Reads a picture, resized and center-cropped to `size`: uint8 [h,w,c]. Raises UserError if it
    cannot be read."""
    from taming_jax.data.images import decode, lift_pillow_limits

    try:
        with lift_pillow_limits():
            return decode(file.read_bytes(), size, channels, resize_mode="crop")
    except FileNotFoundError:
        raise UserError(f"there is no picture {file}.") from None
    except Exception as error:  # Pillow raises many types
        raise UserError(
            f"{file} cannot be read as a picture; check that it is an undamaged image file."
        ) from error


def check_flags(args: Sample) -> str:
    """Returns the suffix of --out, which determines the format: .npz, .png, or "" for a folder.
    Raises UserError if --out cannot be written, or if flags contradict each other."""
    out = args.out
    suffix = "" if out.is_dir() else out.suffix
    if suffix:
        check_output("--out", out, [".npz", ".png"])
    elif out.is_file():
        raise UserError(f"--out {out} is a file; name a folder, or a .npz or .png file.")
    else:
        check_writable("--out", out)
    if not args.complete and (args.keep is not None or args.mask is not None):
        raise UserError(
            "--keep and --mask apply only to completed pictures; name some with --complete."
        )
    if args.keep is not None and args.mask is not None:
        raise UserError("--keep and --mask cannot be used together; leave one out.")
    return suffix
