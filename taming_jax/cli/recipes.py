"""Trains and measures the variations of docs/recipes.md, and prints their rows.

    taming-jax recipes --workdir runs/recipes                 all of mnist_tiny, some hours
    taming-jax recipes --workdir runs/recipes --rows LeCAM    one, and what it varies
    taming-jax recipes --config birds_tiny --data-path DIR --workdir runs/birds_recipes

A row that was measured before is printed again; one that was interrupted goes on.
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
    """Settings of stage 1, of a prior where `of` is a stage 1, of sampling where it is a prior. A
    stage 1 has one prior at most, which is trained in its folder."""

    settings: dict[str, Any]
    of: str = ""


class Table(NamedTuple):
    """A preset's rows by their names, and how many images and samples each is measured on."""

    rows: dict[str, Row]
    images: int
    samples: int


ADAPTIVE = {"vqgan.adaptive_weight": True}
LATE = ADAPTIVE | {"vqgan.discriminator_start": 0.75}
BEFORE = LATE | {"vqgan.code_dim": 8}  # as the preset was before this table
MNIST_TINY = {
    "mnist_tiny": Row({}),
    "seed 1": Row({"seed": 1}),
    "adaptive": Row(ADAPTIVE),
    "adaptive, seed 1": Row(ADAPTIVE | {"seed": 1}),
    "late": Row(LATE),
    "codes of 8": Row(ADAPTIVE | {"vqgan.code_dim": 8}),
    "LeCAM": Row(ADAPTIVE | {"vqgan.lecam_weight": 0.1}),
    "before": Row(BEFORE),
    "before, 32 codes": Row(BEFORE | {"vqgan.codebook_size": 32}),
    "before, 512 codes": Row(BEFORE | {"vqgan.codebook_size": 512}),
    "before, not normalised": Row(BEFORE | {"vqgan.l2_normalise": False}),
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
    """The rows of a preset, trained and measured in a folder, with settings of their data."""

    preset: str
    workdir: Path
    data: dict[str, Any]

    def train(self, folder: Path, settings: dict[str, Any], stage: str) -> float:
        """Trains a stage; returns the seconds that it takes, or not a number where it goes on."""
        start, goes_on = time.monotonic(), (folder / "metrics" / f"{stage}.jsonl").exists()
        overrides = settings | self.data | {"workdir": str(folder)}
        with contextlib.redirect_stdout(sys.stderr):  # stdout has the table alone
            train(load_config(self.preset, overrides), stage)
        return math.nan if goes_on else time.monotonic() - start

    def measure(self, name: str) -> dict[str, Any]:
        """A row's report, with the seconds that its training takes, from its file where that
        exists; otherwise the row, and what it varies, is trained and measured."""
        rows, images, samples = TABLES[self.preset]
        row, file = rows[name], self.workdir / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        base = rows[row.of] if row.of else None
        if base is not None:
            self.measure(row.of)
        folder, seconds, sampling = self.workdir / (row.of or name), 0.0, {}
        if base is None:
            seconds = self.train(folder, row.settings, "vqgan")
        elif not base.of:
            seconds = self.train(folder, base.settings | row.settings, "prior")
        else:
            folder, sampling = self.workdir / base.of, row.settings
        report = evaluate(
            load_run(folder), features="vgg", images=images, samples=samples, **sampling
        ) | {"seconds": seconds}  # fmt: skip
        atomic_write(file, json.dumps(report).encode())
        return report

    def line(self, name: str) -> str:
        """A row of a table in Markdown."""
        row, report = TABLES[self.preset].rows[name], self.measure(name)
        kind = "samples" if row.of else "reconstruction"
        # Only what is known: a classifier reads digits alone.
        values = [f"{report[kind].get(column, math.nan):.3g}" for column in COLUMNS[kind]]
        given = " ".join(
            f"{format_flag(key)} {format_value(value)}" for key, value in row.settings.items()
        )
        settings = f"`{given}`" if given else ""
        return f"| {name} | {settings} | {' | '.join(values)} | {report['seconds']:.0f} |"


@dataclass(frozen=True)
class Settings:
    workdir: Path
    config: Literal["mnist_tiny", "birds_tiny"] = "mnist_tiny"
    data_path: Path | None = None
    """The dataset, in place of a download."""
    rows: tuple[str, ...] = ()
    """By their names. Default: all."""


def main() -> None:
    given = parse(Settings, __doc__)
    workdir, rows = given.workdir.absolute(), TABLES[given.config].rows
    if unknown := [name for name in given.rows if name not in rows]:
        known = ", ".join(f"'{name}'" for name in rows)
        raise UserError(f"there is no row '{unknown[0]}'; there are {known}.")
    workdir.mkdir(parents=True, exist_ok=True)
    data = {"data.path": str(given.data_path.absolute())} if given.data_path else {}
    recipes = Recipes(given.config, workdir, data)
    for kind, columns in COLUMNS.items():
        names = [name for name in given.rows or rows if bool(rows[name].of) == (kind == "samples")]
        if names:
            print("| row | settings |", " | ".join(columns), "| seconds |")
            print("| --- | --- |", " | ".join("---:" for _ in columns), "| ---: |", flush=True)
        for name in names:
            print(recipes.line(name), flush=True)
