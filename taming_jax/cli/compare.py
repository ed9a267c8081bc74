"""Trains stage 1 with several quantizers for equally many steps, and compares them in a table.

    taming-jax compare --workdir runs/compare --config mnist_tiny --quantizers vq ema fsq
    taming-jax compare --workdir runs/compare --quantizers "vq --vqgan.vq.restart-after 20"

Each row is a quantizer, optionally with settings. Settings that are not part of a row, such as
--vqgan.codebook-size 4096, apply to all rows. Rows that are already in the workdir are not trained
again but stay in the table, and interrupted rows are resumed. The workdir gets the table
comparison.md, the figure usage.png, and one folder per row with its run.
"""

import contextlib
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taming_jax.cli.arguments import Training, parse_known, parse_training
from taming_jax.config.load import diff_configs, read_config
from taming_jax.config.quantizers import QUANTIZER_CONFIGS
from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.storage import atomic_write

COLUMNS = ("codes", "psnr", "ssim", "lpips", "fd", "usage", "perplexity", "bits per image")
LOGS = ("vqgan", "vqgan_speed")
FILE = "comparison.json"  # in the folder of each row that is trained and evaluated


@dataclass(frozen=True)
class Compare:
    workdir: Path
    """The folder for the table and the runs of all rows."""
    config: str = "mnist_tiny"
    """The preset, or the path of a config.json."""
    quantizers: tuple[str, ...] = tuple(QUANTIZER_CONFIGS)
    """The rows: names of quantizers, each optionally followed by settings, as in "vq
    --vqgan.vq.restart-after 20". Default: all quantizers."""
    steps: int | None = None
    """The number of steps of each row. Default: as in the preset."""
    images: int | None = None
    """The number of images of the test split to evaluate each row on. Default: all."""


def name_folder(row: str) -> str:
    """Returns the name of a row's folder: "vq --vqgan.seed 1" becomes "vq-vqgan.seed-1"."""
    return re.sub(r"[^\w.]+", "-", row).strip("-")


def load_row_config(args: Compare, row: str, settings: Sequence[str]) -> Config:
    """Returns the config of a row. `settings` are the flags of all rows. The command line parser
    ends the process with status 2 if a flag is invalid, and UserError is raised if settings
    conflict."""
    quantizer, *flags = shlex.split(row) or [""]
    budget = [] if args.steps is None else ["--vqgan.steps", str(args.steps)]
    folder = args.workdir / name_folder(row)
    arguments = ["--config", args.config, "--workdir", str(folder), "--vqgan.quantizer", quantizer]
    arguments += [*settings, *budget, *flags]
    return parse_training(Training, arguments).config


def check_earlier_row(config: Config, row: str) -> None:
    """Raises UserError if the folder of a row holds a run with other settings or steps."""
    if not (config.folder / "config.json").exists():
        return
    earlier = read_config(config.folder / "config.json")
    differences = diff_configs(config, earlier, ("seed", "dtype", "data", "vqgan"))
    if config.vqgan.steps != earlier.vqgan.steps:
        differences.append(f"--vqgan.steps is {config.vqgan.steps}, not {earlier.vqgan.steps}")
    if differences:
        raise UserError(
            f"{config.folder} holds the row '{row}' with other settings: {'; '.join(differences)}. "
            "Use the same settings, or another --workdir."
        )


def measure(config: Config, row: str, images: int | None) -> None:
    """Trains and evaluates a row, and writes its results into its folder."""
    from taming_jax.evaluation.report import evaluate
    from taming_jax.run import load_run
    from taming_jax.training import train

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        train(config)
        report = evaluate(load_run(config.folder), features="vgg", images=images, samples=0)
    log, speeds = (read_lines(config.folder / "metrics" / f"{x}.jsonl") for x in LOGS)
    usage = [(x["step"], x["usage"]) for x in log if x["split"] == "validation"]
    result = report["reconstruction"] | {
        "row": row,
        "codes": config.vqgan.codebook_size,
        "bits per image": report["reconstruction"]["bits_per_pixel"] * config.data.image_size**2,
        "seconds per step": 1 / statistics.median(x["steps_per_second"] for x in speeds),
        "usage_by_step": usage,
    }
    atomic_write(config.folder / FILE, json.dumps(result).encode())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads a log of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_results(workdir: Path) -> list[dict[str, Any]]:
    """Returns the results of all rows in a workdir, in the order of the quantizers."""
    results = [json.loads(file.read_text()) for file in workdir.glob(f"*/{FILE}")]
    order = list(QUANTIZER_CONFIGS)
    return sorted(results, key=lambda x: (order.index(x["row"].split()[0]), x["row"]))


def format_table(results: list[dict[str, Any]]) -> str:
    """Formats the results of rows as a Markdown table."""
    columns = (*COLUMNS, "seconds per step")
    lines = [
        f"| quantizer | {' | '.join(columns)} |",
        f"| --- | {' | '.join('---:' for _ in columns)} |",
    ]
    for result in results:
        # Small images have neither SSIM nor LPIPS.
        values = [f"{result.get(column, math.nan):.4g}" for column in columns]
        lines.append(f"| {result['row']} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args, settings = parse_known(Compare, __doc__)
    configs = {row: load_row_config(args, row, settings) for row in args.quantizers}
    args.workdir.mkdir(parents=True, exist_ok=True)
    for row, config in configs.items():
        check_earlier_row(config, row)
    for row, config in configs.items():
        if not (config.folder / FILE).exists():
            measure(config, row, args.images)
        results = read_results(args.workdir)
        atomic_write(args.workdir / "comparison.md", format_table(results).encode())
    from taming_jax import figures  # slow to import

    curves = {result["row"]: result["usage_by_step"] for result in results}
    title = "Share of codes in use on the validation split"
    figures.plot_curves(curves, args.workdir / "usage.png", title, "share of codes")
    print(format_table(results), end="")
