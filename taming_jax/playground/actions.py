"""What the page of the playground can ask of a run: the methods of `Playground` named in `ACTIONS`.

They take a `Request`, and return dictionaries for JSON in which images are data URLs.
"""

import base64
import functools
import io
import math
import shlex
import typing
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from taming_jax import figures
from taming_jax.config.sampling import SamplingSettings
from taming_jax.data.images import decode, lift_pillow_limits
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.card import describe_model, find_report_problem
from taming_jax.evaluation.table import REPORT, format_report, read_report
from taming_jax.metrics.similarity import psnr
from taming_jax.run import BATCH, Run
from taming_jax.sampler import Drawing

ACTIONS = ("sample", "complete", "reconstruct", "decode", "codebook", "usage", "report")
MAX_IMAGES = 64  # per request
MAX_DECODED_MIB = 256  # of an uploaded picture
MAX_TILES = 2**14  # codes of the codebook that are decoded
TILES_PER_REQUEST = 1024  # so that other requests have their turn in between
TILE_GRID = 4  # height and width of the grids that codes are decoded from


class Stopped(Exception):
    """The client has disconnected."""


@dataclass(frozen=True, kw_only=True)
class Request(SamplingSettings):
    """The arguments of all actions; each of them uses some."""

    classes: tuple[int, ...] = ()
    """The numbers of classes. For completions, none means no class."""
    per_class: int = 1
    picture: str = ""
    """An image file, base64."""
    keep: tuple[tuple[bool, ...], ...] = ()
    """Whether each code of the picture is kept, row by row."""
    codes: tuple[tuple[int, ...], ...] = ()
    """A grid of codes, row by row."""

    @property
    def overrides(self) -> dict[str, Any]:
        """The sampling settings that the page set."""
        return {name: x for name, x in self.sampling.items() if x is not None}


class Playground:
    """A run and the actions of the page. Only one thread may use it at a time."""

    def __init__(self, run: Run):
        self.run, self.is_stopped = run, lambda: False
        self.description = self._describe()
        self._tiles = np.empty((0, run.factor, run.factor, run.config.data.channels), np.uint8)

    def _describe(self) -> dict[str, Any]:
        """Returns what the page needs to know about the run."""
        run, config = self.run, self.run.config
        description = {
            "name": run.workdir.absolute().name, "model": describe_model(run).replace("`", ""),
            "size": config.data.image_size, "channels": config.data.channels, "factor": run.factor,
            "grid": config.grid_size, "codes": config.vqgan.codebook_size, "maxImages": MAX_IMAGES,
        }  # fmt: skip
        if run.transformer is None:
            return description
        settings = run.sampler.resolve_settings()
        if not config.prior.label_dropout:
            del settings["guidance_scale"]  # it would be refused
        choices = {
            name: [value for kind in typing.get_args(hint) for value in typing.get_args(kind)]
            for name, hint in typing.get_type_hints(SamplingSettings).items()
        }
        return description | {
            "classes": run.class_names, "trained": run.trained_classes,
            "limits": run.prior.completion_limits,
            "needsClass": len(run.class_names) > 1 and not config.prior.label_dropout,
            "settings": [[name, value, choices[name]] for name, value in settings.items()],
        }  # fmt: skip

    def sample(self, request: Request) -> dict[str, Any]:
        """Draws images of classes."""
        classes = list(dict.fromkeys(request.classes))
        self._check_count(len(classes) * request.per_class)
        drawing = self.run.sampler.plan_samples(classes, request.per_class)
        names = [self.run.class_names[i] for i in classes]
        flags = {"classes": names, "per_class": request.per_class} | request.overrides
        arguments = format_arguments([names, request.per_class], request.overrides)
        return self._draw(drawing, request) | {
            "command": format_command("sample", self.run, flags | {"out": "samples.png"}),
            "python": format_code(self.run, f"images = run.sample({arguments})"),
        }

    def complete(self, request: Request) -> dict[str, Any]:
        """Completes a picture. Also returns it at the training size, and its mask."""
        run, factor = self.run, self.run.factor
        self._check_count(request.per_class)
        image, keep = self._read_picture(request), self._read_grid(request.keep)
        drawing = run.sampler.plan_completions(
            run.encode(image[None]), request.classes or None, request.per_class, 0.5, keep
        )
        names = [run.class_names[i] for i in request.classes]
        flags = {"mask": "mask.png", "per_class": request.per_class} | request.overrides
        if names:
            flags["classes"] = names
        command = format_command("complete picture.png", run, flags | {"out": "completions.png"})
        arguments = format_arguments([names or None, request.per_class], request.overrides)
        mode, axes = ("RGB", "[None]") if image.shape[-1] == 3 else ("L", "[None, ..., None]")
        code = (
            f'images = np.asarray(Image.open("picture.png").convert("{mode}")){axes}\n'
            'mask = np.asarray(Image.open("mask.png")) > 127\n'
            f"completions = run.complete(images, {arguments}, mask=mask)"
        )
        mask = np.kron(keep, np.full((factor, factor), 255, np.uint8))
        return self._draw(drawing, request) | {
            "original": to_url(image), "mask": to_url(mask[..., None]), "command": command,
            "python": "import numpy as np\nfrom PIL import Image\n" + format_code(run, code),
        }  # fmt: skip

    def reconstruct(self, request: Request) -> dict[str, Any]:
        """Encodes and decodes a picture."""
        images = self._read_picture(request)[None]
        codes = self.run.encode(images)
        reconstruction = to_uint8(self.run.decode(codes))
        errors, colored = figures.color_errors(images, reconstruction)
        return {
            "original": to_url(images[0]), "image": to_url(reconstruction[0]),
            "codes": codes[0].tolist(), "error": to_url(colored[0]),
            "meanError": float(errors.mean()) / 255,
            "psnr": float(psnr(*(jnp.asarray(x / 255) for x in (images, reconstruction)))[0]),
            "python": format_code(self.run, f"images = run.decode({codes.tolist()})"),
        }  # fmt: skip

    def decode(self, request: Request) -> dict[str, Any]:
        """Decodes a grid of codes."""
        codes = self._read_grid(request.codes)[None]
        line = f"images = run.decode({codes.tolist()})"
        image = to_uint8(self.run.decode(codes))[0]
        return {
            "image": to_url(image), "codes": request.codes, "python": format_code(self.run, line)
        }  # fmt: skip

    def codebook(self, request: Request) -> dict[str, Any]:
        """Returns a sheet with one tile per code: the middle of a grid of that code, decoded. Call
        it again until it has all tiles."""
        total = min(self.run.config.vqgan.codebook_size, MAX_TILES)
        side, factor = min(self.run.config.grid_size, TILE_GRID), self.run.factor
        middle = slice(side // 2 * factor, (side // 2 + 1) * factor)
        goal = min(len(self._tiles) + TILES_PER_REQUEST, total)
        while len(self._tiles) < goal and not self.is_stopped():
            codes = np.arange(len(self._tiles), min(len(self._tiles) + BATCH, goal))
            grids = np.broadcast_to(codes[:, None, None], (len(codes), side, side))
            tiles = to_uint8(self.run.decode(grids)[:, middle, middle])
            self._tiles = np.concatenate([self._tiles, tiles])
        columns = math.isqrt(total - 1) + 1
        sheet = figures.tile_images(self._tiles, columns, gap=0)
        count = len(self._tiles)
        return {"sheet": to_url(sheet), "columns": columns, "count": count, "total": total}

    @functools.cached_property
    def _usage(self) -> dict[str, Any]:
        codes = self.run.tokens("validation").images
        counts = np.bincount(codes.ravel(), minlength=self.run.config.vqgan.codebook_size)
        return {"counts": counts.tolist(), "images": len(codes)}

    def usage(self, request: Request) -> dict[str, Any]:
        """Counts how often each code occurs in the validation split."""
        return self._usage

    def report(self, request: Request) -> dict[str, Any]:
        """Returns the run's evaluation report, if there is one, and the figures of its training."""
        file, folder = self.run.workdir / REPORT, self.run.workdir / "figures"
        report = read_report(file) if file.is_file() else None
        files = [file for file in sorted(folder.glob("*.png")) if not file.is_symlink()]
        return {
            "problem": find_report_problem(self.run, report),
            "report": "" if report is None else format_report(report),
            "command": format_command("evaluate", self.run, {}),
            "figures": [[file.stem, to_url(file.read_bytes())] for file in files],
        }

    def _check_count(self, count: int) -> None:
        if count > MAX_IMAGES:
            raise UserError(f"{count} images are too many; draw at most {MAX_IMAGES} at once.")

    def _read_picture(self, request: Request) -> np.ndarray:
        """Decodes the picture of a request at the training size, uint8 [h,w,c]."""
        data = self.run.config.data
        try:
            content = base64.b64decode(request.picture, validate=True)
            with lift_pillow_limits():
                return decode(content, data.image_size, data.channels, "crop", MAX_DECODED_MIB)
        except Exception as error:  # Pillow raises many types
            raise UserError(
                "the picture cannot be read; choose an undamaged image file that takes at most "
                f"{MAX_DECODED_MIB} MiB when it is decoded."
            ) from error

    def _read_grid(self, rows: tuple[tuple[Any, ...], ...]) -> np.ndarray:
        """Returns a grid with one value per code as an array [h',w']."""
        side = self.run.config.grid_size
        if len(rows) != side or any(len(row) != side for row in rows):
            raise UserError(f"the grid must have {side} rows of {side} values.")
        return np.asarray(rows)

    def _draw(self, drawing: Drawing, request: Request) -> dict[str, Any]:
        """Draws images, and returns one dictionary per image, and a sheet of all images. Raises
        Stopped if it is stopped."""
        most, batches = self.run.config.grid_size**2, []
        if (request.decoding_steps or 0) > most:
            raise UserError(f"decoding-steps must be at most {most}, the number of codes.")
        for batch in self.run.sampler.draw_with_codes(drawing, **request.sampling):
            if self.is_stopped():
                raise Stopped
            batches.append(batch)
        images, codes, passes = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        rows = zip(map(to_url, to_uint8(images)), codes, passes, drawing.labels, strict=True)
        return {
            "pictures": [
                {"image": url, "codes": x.tolist(), "passes": p.tolist(), "label": int(label)}
                for url, x, p, label in rows
            ],
            "sheet": to_url(figures.tile_images(images, min(8, len(images)), gap=0)),
        }


def to_url(image: np.ndarray | bytes) -> str:
    """Returns an image uint8 [h,w,c], or the bytes of a PNG file, as a data URL."""
    if isinstance(image, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "PNG")
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def format_command(name: str, run: Run, flags: dict[str, Any]) -> str:
    """Returns a command with flags."""
    words = ["taming-jax", *name.split(), "--workdir", str(run.workdir)]
    for flag, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{flag.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def format_arguments(values: list[Any], settings: dict[str, Any]) -> str:
    """Returns arguments of a function, as Python code."""
    return ", ".join([*map(repr, values), *(f"{name}={x!r}" for name, x in settings.items())])


def format_code(run: Run, code: str) -> str:
    """Returns lines for a notebook that load a run, and then the given ones."""
    return f"import taming_jax\n\nrun = taming_jax.load_run({str(run.workdir)!r})\n{code}"
