"""Draws new images from a run of both stages, or completes pictures.

    taming-jax sample --workdir runs/mnist --classes 0 1 2 --per-class 8 --out grid.png
    taming-jax sample --workdir runs/birds --size 512x384 --per-class 1 --out wide.png
    taming-jax sample --workdir runs/birds --complete bird.jpg --keep top --out rest.png

`--out` determines the format: FILE.npz (`images` uint8 [n,h,w,c], `labels` int32 [n]), FILE.png (a
labeled grid, one row per class), or a folder (one PNG per image). The sampling settings default to
those of the run.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tyro

from taming_jax.cli.arguments import check_output, parse
from taming_jax.errors import RunFailed, UserError
from taming_jax.storage import check_writable, expand_user

if TYPE_CHECKING:
    from taming_jax.cli.sample_files import SampleFiles
    from taming_jax.run import Run

MAX_ROWS = 10  # in a grid, if --classes is not set


@dataclass(frozen=True, kw_only=True)
class Sample:
    workdir: Path
    """The run's folder."""
    out: Path
    """The FILE.npz, FILE.png or folder to write."""
    classes: tuple[str, ...] = ()
    """Class numbers or names. Default: all (at most 10 in a grid), or none for completions."""
    per_class: int = 8
    """The number of images per class, or of completions per picture."""
    temperature: float | None = None
    """The sampling temperature; 0 takes the most likely codes."""
    top_k: int | None = None
    """The number of most likely codes to draw from."""
    top_p: float | None = None
    """Draw from the smallest set of most likely codes whose probabilities sum to at least this."""
    guidance_scale: tuple[float, ...] = ()
    """1 is no guidance, 2 is strong; two numbers are the scales of the first and the last code."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, at least the training size. Larger images are drawn in windows."""
    complete: tuple[str, ...] = ()
    """Pictures to complete, --per-class times each. Give one class for all, or one per picture."""
    keep: float | Literal["top"] | None = None
    """The part of the pictures to keep: top for the upper half (the default), or the
    fraction of rows to keep from the top."""
    mask: Path | None = None
    """Instead of --keep: a picture that is white where pixels are kept."""
    seed: int = 0
    """The random seed."""
    devices: int | None = None
    """The number of devices to use. Default: all."""
    batch_size: int | None = None
    """The number of images to draw at once. Default: one micro-batch per device, which needs the
    least memory. It does not affect the images."""


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


class SampleGrid(NamedTuple):
    """A grid of images uint8 [n,h,w,c] and their classes int32 [n] (-1: no class), row by row. Each
    row has a title, a prefix for its file names and, if it completes a picture, that picture:
    `originals` uint8 [rows,h,w,c]."""

    images: np.ndarray
    labels: np.ndarray
    titles: list[str]
    prefixes: list[str]
    originals: np.ndarray | None = None


def write_folder(out: Path, grid: SampleGrid) -> None:
    """Writes one PNG per image, named after its row and its position in the row."""
    from PIL import Image

    out.mkdir(exist_ok=True)
    columns = len(grid.images) // len(grid.prefixes)
    for i, image in enumerate(grid.images):
        file = out / f"{grid.prefixes[i // columns]}_{i % columns:05d}.png"
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file)


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
    from taming_jax.cli.sample_files import lock_output
    from taming_jax.data.pixels import to_uint8
    from taming_jax.run import load_run

    run = load_run(args.workdir)
    settings = {
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
        "guidance_scale": args.guidance_scale or None, "seed": args.seed,
        "devices": args.devices, "batch_size": args.batch_size, "progress": True,
    }  # fmt: skip
    if args.complete:
        grid = complete_pictures(run, args, size, settings)
        write_samples(args.out, suffix, grid)
        print(f"Wrote {len(grid.images)} completions of {len(grid.titles)} pictures to {args.out}.")
        return
    classes = choose_classes(run, args.classes, MAX_ROWS if suffix == ".png" else None)
    if suffix == ".png":
        images = to_uint8(run.sample(classes, args.per_class, size=size, **settings))
        names = [run.class_names[i] for i in classes]
        write_samples(args.out, suffix, SampleGrid(images, classes, names, names))
    else:
        with lock_output(args.out):
            draw_to_files(run, args, classes, suffix, size, settings)
    print(f"Wrote {len(classes) * args.per_class} images of {len(classes)} classes to {args.out}.")
    if not args.classes and len(classes) < len(run.class_names):
        print(f"There are {len(run.class_names)} classes; choose others with --classes.")


def choose_classes(run: "Run", names: tuple[str, ...], limit: int | None) -> np.ndarray:
    """Returns the classes `names`, int32 [n], without duplicates. Default: those with training
    images, or at most `limit` of them, evenly spaced."""
    from taming_jax.data.datasets import evenly_spaced

    if names:
        return np.array(list(dict.fromkeys(run.to_labels(names).tolist())), np.int32)
    trained = np.array(run.trained_classes, np.int32)
    return trained[evenly_spaced(len(trained), limit or len(trained))]


def draw_to_files(
    run: "Run",
    args: Sample,
    classes: np.ndarray,
    suffix: str,
    size: tuple[int, int] | None,
    settings: dict[str, Any],
) -> None:
    """Draws images and writes them as they are drawn, except those that are written already."""
    from taming_jax.cli.sample_files import NpzFile, PngFolder
    from taming_jax.data.pixels import to_uint8

    labels, numbers = run.number_images(classes, args.per_class)
    names = ("temperature", "top_k", "top_p", "guidance_scale", "seed")
    sampling = run.resolve_sampling(**{name: settings[name] for name in names})
    config = run.config.data
    shape = (*(size or (config.image_size, config.image_size)), config.channels)
    manifest = {
        "weights": run.hash_weights(), **sampling._asdict(), "seed": args.seed, "shape": shape,
    }  # fmt: skip
    files: SampleFiles = PngFolder(args.out, manifest)
    if suffix:
        manifest |= {"classes": classes.tolist(), "per_class": args.per_class}
        files = NpzFile(args.out, manifest, shape)
    missing = files.find_missing(labels, numbers)
    if len(missing) < len(labels):
        print(f"{len(labels) - len(missing)} of {len(labels)} images are drawn already.")
    labels_left, numbers_left, start = labels[missing], numbers[missing], 0
    try:
        for images in run.draw_samples(labels_left, numbers_left, size=size, **settings):
            part = slice(start, start + len(images))
            files.write(labels_left[part], numbers_left[part], to_uint8(images))
            start += len(images)
        files.finish(labels)
    except OSError as error:
        raise RunFailed(f"{args.out} could not be written: {error.strerror or error}.") from error


def complete_pictures(
    run: "Run", args: Sample, size: tuple[int, int] | None, settings: dict[str, Any]
) -> SampleGrid:
    """Completes the pictures of --complete. Raises UserError if one cannot be read."""
    from taming_jax.data.pixels import to_uint8

    config, files = run.config.data, [expand_user(name) for name in args.complete]
    shape = size or (config.image_size, config.image_size)

    pictures = np.stack([read_picture(file, shape, config.channels) for file in files])
    mask = None if args.mask is None else read_picture(args.mask, shape, 1)[..., 0] > 127
    classes = args.classes or None
    keep = args.keep if isinstance(args.keep, float) else 0.5
    images = run.complete(pictures, classes, args.per_class, keep=keep, mask=mask, **settings)
    labels = np.full(len(pictures), -1) if classes is None else run.to_labels(classes)
    labels = np.repeat(np.broadcast_to(labels, len(pictures)), args.per_class)
    titles = [file.stem for file in files]
    prefixes = [f"{i:04d}_{title}" for i, title in enumerate(titles)]
    return SampleGrid(to_uint8(images), labels.astype(np.int32), titles, prefixes, pictures)


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


def write_samples(out: Path, suffix: str, grid: SampleGrid) -> None:
    """Writes the images in the format of the suffix."""
    from taming_jax.figures import draw_grid, save

    columns = len(grid.images) // len(grid.titles)
    try:
        if suffix == ".npz":
            np.savez_compressed(out, images=grid.images, labels=grid.labels)
        elif suffix == ".png":
            images, below = grid.images, []
            if grid.originals is not None:
                rows = images.reshape(len(grid.titles), columns, *images.shape[1:])
                images = np.concatenate([grid.originals[:, None], rows], 1)
                images, columns = images.reshape(-1, *images.shape[2:]), columns + 1
                below = ["original", *[""] * (columns - 1)]
            save(draw_grid(images, grid.titles, columns, below=below), out)
        else:
            write_folder(out, grid)
    except OSError as error:
        raise RunFailed(f"{out} could not be written: {error.strerror or error}.") from error
