"""Trains and measures the variations of docs/recipes.md, and prints their rows.

    taming-jax recipes --workdir runs/recipes                 all of mnist_tiny, some hours
    taming-jax recipes --workdir runs/recipes --rows LeCAM    one, and what it varies
    taming-jax recipes --config birds_tiny --data-path DIR --workdir runs/birds_recipes

A row that was measured before is printed again; one that was interrupted goes on.
"""

import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from taming_jax.cli.arguments import parse
from taming_jax.errors import UserError
from taming_jax.files import write_whole

CPU_SETUP = Path(__file__).parents[2] / "scripts" / "cpu.sh"  # in a checkout


class Row(NamedTuple):
    """Settings of stage 1, of a prior where `of` is a stage 1, of sampling where it is a prior."""

    settings: str = ""
    of: str = ""


class Table(NamedTuple):
    """A preset's rows by their names, and how many images and samples each is measured on."""

    rows: dict[str, Row]
    images: int
    samples: int


ADAPTIVE = "--vqgan.adaptive-weight"
LATE = f"{ADAPTIVE} --vqgan.discriminator-start 0.75"
BEFORE = f"{LATE} --vqgan.code-dim 8"  # as the preset was before this table
MNIST_TINY = {
    "mnist_tiny": Row(),
    "seed 1": Row("--seed 1"),
    "adaptive": Row(ADAPTIVE),
    "adaptive, seed 1": Row(f"{ADAPTIVE} --seed 1"),
    "late": Row(LATE),
    "codes of 8": Row(f"{ADAPTIVE} --vqgan.code-dim 8"),
    "LeCAM": Row(f"{ADAPTIVE} --vqgan.lecam-weight 0.1"),
    "before": Row(BEFORE),
    "before, 32 codes": Row(f"{BEFORE} --vqgan.codebook-size 32"),
    "before, 512 codes": Row(f"{BEFORE} --vqgan.codebook-size 512"),
    "before, not normalised": Row(f"{BEFORE} --vqgan.no-l2-normalise"),
    "prior": Row(of="mnist_tiny"),
    "prior, adaptive": Row(of="adaptive"),
    "prior before": Row(of="before"),
    "guidance 0, before": Row("--guidance-scale 0", "prior before"),
    "guidance 1, before": Row("--guidance-scale 1", "prior before"),
    "guidance 1.5, before": Row("--guidance-scale 1.5", "prior before"),
    "guidance 3, before": Row("--guidance-scale 3", "prior before"),
}
BIRDS_TINY = {
    "birds_tiny": Row(),
    "no discriminator": Row("--vqgan.discriminator-start 1"),
    "DiffAugment": Row("--vqgan.diff-augment color translation cutout"),
}
TABLES = {
    "mnist_tiny": Table(MNIST_TINY, 2000, 2000),
    "birds_tiny": Table(BIRDS_TINY, 100, 100),
}
COLUMNS = {
    "reconstruction": ("psnr", "ssim", "lpips", "fd", "usage", "perplexity"),
    "samples": ("fd", "kd", "precision", "recall", "coverage", "accuracy"),
}


def run(*arguments: str) -> None:
    """A subcommand of taming-jax, in a checkout as scripts/cpu.sh sets up a CPU. Ends this process
    where it fails."""
    command = shlex.join([sys.executable, "-m", "taming_jax.cli", *arguments])
    print(command, file=sys.stderr, flush=True)
    setup = f". {shlex.quote(str(CPU_SETUP))}; " if CPU_SETUP.exists() else ""
    line = ["bash", "-c", f"set -e; {setup}exec {command}"]
    if code := subprocess.run(line, stdout=sys.stderr, check=False).returncode:
        sys.exit(code)


class Recipes:
    """The rows of a preset, trained and measured in a folder. `data_path` is the preset's dataset,
    where that is not downloaded."""

    def __init__(self, preset: str, workdir: Path, data_path: Path | None):
        self.preset, self.workdir, self.table = preset, workdir, TABLES[preset]
        self.data = ["--data.path", str(data_path)] if data_path else []

    def measured(self, name: str) -> dict[str, Any]:
        """A row's report, with the seconds its training took, where that was not interrupted;
        trained and measured if it is not yet."""
        row, file, folder = (
            self.table.rows[name],
            self.workdir / f"{name}.json",
            self.workdir / name,
        )
        if file.exists():
            return json.loads(file.read_text())
        command, sampling, settings = "", [], row.settings.split()
        if not row.of:
            command, log = "train-vqgan", folder / "metrics" / "vqgan.jsonl"
        elif not self.table.rows[row.of].of:
            self.measured(row.of)
            command, log = "train-prior", folder / "metrics" / "prior.jsonl"
            if not folder.exists():
                shutil.rmtree(self.workdir / "copying", ignore_errors=True)
                shutil.copytree(self.workdir / row.of, self.workdir / "copying")
                (self.workdir / "copying").rename(folder)
        else:
            self.measured(row.of)
            folder, sampling = self.workdir / row.of, settings
        seconds = 0.0
        if command:
            begun, fresh = time.monotonic(), not log.exists()
            run(command, "--config", self.preset, "--workdir", str(folder), *self.data, *settings)
            seconds = time.monotonic() - begun if fresh else math.nan
        out = self.workdir / "report.json"
        run(
            "evaluate", "--workdir", str(folder), "--features", "vgg", "--split", "test",
            "--images", str(self.table.images), "--samples", str(self.table.samples), *sampling,
            "--out", str(out),
        )  # fmt: skip
        report = json.loads(out.read_text()) | {"seconds": seconds}
        write_whole(file, json.dumps(report).encode())
        return report

    def line(self, name: str) -> str:
        """A row of a table in Markdown."""
        row, found = self.table.rows[name], self.measured(name)
        kind = "samples" if row.of else "reconstruction"
        # Only what is known: a classifier reads digits alone.
        values = [f"{found[kind].get(column, math.nan):.3g}" for column in COLUMNS[kind]]
        settings = f"`{row.settings}`" if row.settings else ""
        return f"| {name} | {settings} | {' | '.join(values)} | {found['seconds']:.0f} |"


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
    data_path = given.data_path and given.data_path.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    recipes = Recipes(given.config, workdir, data_path)
    for kind, columns in COLUMNS.items():
        names = [name for name in given.rows or rows if bool(rows[name].of) == (kind == "samples")]
        if names:
            print("| row | settings |", " | ".join(columns), "| seconds |")
            print("| --- | --- |", " | ".join("---:" for _ in columns), "| ---: |", flush=True)
        for name in names:
            print(recipes.line(name), flush=True)
