"""Trains and evaluates the rows of docs/recipes.md, and prints them as tables.

    taming-jax recipes --workdir runs/recipes                 all rows of mnist_tiny (hours)
    taming-jax recipes --workdir runs/recipes --rows LeCam    one row
    taming-jax recipes --config birds_tiny --data-path DIR --workdir runs/birds_recipes

Rows that were already evaluated are only printed, and interrupted rows are resumed. If a row builds
on another, the other is trained and evaluated first.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from taming_jax.cli.arguments import parse
from taming_jax.config.load import format_value, load_config
from taming_jax.config.validation import format_flag
from taming_jax.errors import UserError
from taming_jax.evaluation.report import evaluate
from taming_jax.run import load_run
from taming_jax.storage import atomic_write
from taming_jax.training import train


class Row(NamedTuple):
    """A row: a stage 1 if it has no base, a prior if its base is a stage 1, or samples if its base
    is a prior. `settings` override those of the base or, without a base, of the preset. A stage 1
    has at most one prior, which is trained in its folder."""

    settings: dict[str, Any]
    base: str = ""


class Table(NamedTuple):
    """A preset's rows by name, and the numbers of images and samples to evaluate them on."""

    rows: dict[str, Row]
    images: int
    samples: int


ADAPTIVE = {"vqgan.adaptive_weight": True}
LATE = ADAPTIVE | {"vqgan.discriminator_start": 0.75}
BEFORE = LATE | {"vqgan.code_dim": 8}  # the preset before these measurements
MNIST_TINY = {
    "mnist_tiny": Row({}),
    "seed 1": Row({"seed": 1}),
    "adaptive": Row(ADAPTIVE),
    "adaptive, seed 1": Row(ADAPTIVE | {"seed": 1}),
    "late": Row(LATE),
    "8-dimensional codes": Row(ADAPTIVE | {"vqgan.code_dim": 8}),
    "LeCam": Row(ADAPTIVE | {"vqgan.lecam_weight": 0.1}),
    "before": Row(BEFORE),
    "before, 32 codes": Row(BEFORE | {"vqgan.codebook_size": 32}),
    "before, 512 codes": Row(BEFORE | {"vqgan.codebook_size": 512}),
    "before, not normalized": Row(BEFORE | {"vqgan.vq.l2_normalise": False}),
    "prior": Row({}, "mnist_tiny"),
    "prior, adaptive": Row({}, "adaptive"),
    "prior before": Row({}, "before"),
    "guidance 0, before": Row({"guidance_scale": 0.0}, "prior before"),
    "guidance 1, before": Row({"guidance_scale": 1.0}, "prior before"),
    "guidance 1.5, before": Row({"guidance_scale": 1.5}, "prior before"),
    "guidance 3, before": Row({"guidance_scale": 3.0}, "prior before"),
}
BIRDS_TINY = {
    "birds_tiny": Row({}),
    "no discriminator": Row({"vqgan.discriminator_start": 1.0}),
    "DiffAugment": Row({"vqgan.diff_augment": ("color", "translation", "cutout")}),
}
TABLES = {
    "mnist_tiny": Table(MNIST_TINY, 2000, 2000),
    "birds_tiny": Table(BIRDS_TINY, 100, 100),
}
COLUMNS = {
    "reconstruction": ("psnr", "ssim", "lpips", "fd", "usage", "perplexity"),
    "samples": ("fd", "kd", "precision", "recall", "coverage", "accuracy"),
}


@dataclass(frozen=True)
class Recipes:
    """Trains and evaluates the rows of a preset in a folder. `data` overrides data settings."""

    preset: str
    workdir: Path
    data: dict[str, Any]

    def train(self, folder: Path, settings: dict[str, Any], stage: str) -> float:
        """Trains a stage. Returns the duration in seconds, or NaN if training resumed."""
        start, resumes = time.monotonic(), (folder / "metrics" / f"{stage}.jsonl").exists()
        overrides = settings | self.data | {"workdir": str(folder)}
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            train(load_config(self.preset, overrides), stage)
        return math.nan if resumes else time.monotonic() - start

    def evaluate(self, name: str) -> dict[str, Any]:
        """Returns a row's report, with the duration of its training in seconds. Trains and
        evaluates the row and its base first if the row has no report yet."""
        rows, images, samples = TABLES[self.preset]
        row, file = rows[name], self.workdir / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        base = rows[row.base] if row.base else None
        if base is not None:
            self.evaluate(row.base)
        folder, seconds, sampling = self.workdir / (row.base or name), 0.0, {}
        if base is None:
            seconds = self.train(folder, row.settings, "vqgan")
        elif not base.base:
            seconds = self.train(folder, base.settings | row.settings, "prior")
        else:
            folder, sampling = self.workdir / base.base, row.settings
        report = evaluate(
            load_run(folder), features="vgg", images=images, samples=samples, **sampling
        ) | {"seconds": seconds}  # fmt: skip
        atomic_write(file, json.dumps(report).encode())
        return report

    def format_row(self, name: str) -> str:
        """Returns a row of the Markdown table."""
        row, report = TABLES[self.preset].rows[name], self.evaluate(name)
        kind = "samples" if row.base else "reconstruction"
        # Some metrics may be missing, such as the accuracy, which exists only for MNIST.
        values = [f"{report[kind].get(column, math.nan):.3g}" for column in COLUMNS[kind]]
        flags = " ".join(
            f"{format_flag(key)} {format_value(value)}" for key, value in row.settings.items()
        )
        settings = f"`{flags}`" if flags else ""
        return f"| {name} | {settings} | {' | '.join(values)} | {report['seconds']:.0f} |"


@dataclass(frozen=True)
class Settings:
    workdir: Path
    """The folder for the runs and reports of all rows."""
    config: Literal["mnist_tiny", "birds_tiny"] = "mnist_tiny"
    """The preset."""
    data_path: Path | None = None
    """The folder with the dataset's files. Default: as in the preset."""
    rows: tuple[str, ...] = ()
    """The names of the rows. Default: all rows."""


def main() -> None:
    args = parse(Settings, __doc__)
    workdir, rows = args.workdir.absolute(), TABLES[args.config].rows
    if unknown := [name for name in args.rows if name not in rows]:
        known = ", ".join(f"'{name}'" for name in rows)
        raise UserError(f"there is no row '{unknown[0]}'; the rows are {known}.")
    workdir.mkdir(parents=True, exist_ok=True)
    data = {"data.path": str(args.data_path.absolute())} if args.data_path else {}
    recipes = Recipes(args.config, workdir, data)
    for kind, columns in COLUMNS.items():
        names = [name for name in args.rows or rows if bool(rows[name].base) == (kind == "samples")]
        if names:
            print("| row | settings |", " | ".join(columns), "| seconds |")
            print("| --- | --- |", " | ".join("---:" for _ in columns), "| ---: |", flush=True)
        for name in names:
            print(recipes.format_row(name), flush=True)
