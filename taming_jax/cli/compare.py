"""Trains stage 1 with several quantizers for equally many steps, and compares them in a table.

    taming-jax compare --workdir runs/compare --config mnist_tiny --quantizers vq ema fsq
    taming-jax compare --workdir runs/compare --quantizers "vq --vqgan.vq.restart-after 20"

Each row is a quantizer, optionally with settings. Settings that are not part of a row, such as
--vqgan.codebook-size 4096, apply to all rows. Rows that are already in the workdir are not trained
again but stay in the table, and interrupted rows are resumed. If a row fails, the others continue.
The workdir gets the table comparison.md, the figure usage.png, and one folder per row with its run.
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
from taming_jax.config.quantizers import QUANTIZER_CONFIGS
from taming_jax.config.schema import Config
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.storage import atomic_write, folder_lock, report_unwritable

COLUMNS = (
    "codes", "psnr", "ssim", "lpips", "fd", "usage", "perplexity", "bits per image",
    "seconds per step",
)  # fmt: skip
RESULT = "result.json"  # in the folder of each row that is trained and evaluated
# Flags that neither a row nor all rows may set.
RESERVED = ("--config", "--workdir", "--restart", "--vqgan.quantizer", "--vqgan.steps",
            "--vqgan.epochs", "--distributed")  # fmt: skip


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


@dataclass(frozen=True)
class Row:
    """A row of the table: its label as on the command line, and its config."""

    label: str
    config: Config


def name_folder(label: str) -> str:
    """Returns the name of a row's folder: "vq --seed 1" becomes "vq-seed-1"."""
    return re.sub(r"[^\w.]+", "-", label).strip("-")


def load_row(args: Compare, label: str, settings: Sequence[str]) -> Row:
    """Returns a row. `settings` are the flags of all rows. Raises UserError, which names the row,
    if settings are reserved, invalid or in conflict. For a flag that does not exist, the parser
    prints a message and ends the process with status 2."""
    try:
        quantizer, *flags = shlex.split(label) or [""]
        flags = [*settings, *flags]
        reserved = {flag.split("=")[0] for flag in flags} & set(RESERVED)
        if reserved:
            raise UserError(
                f"{min(reserved)} must be the same for all rows. Leave it out, or set it with "
                "--config, --workdir, --quantizers or --steps of this command."
            )
        budget = [] if args.steps is None else ["--vqgan.steps", str(args.steps)]
        folder = str(args.workdir / name_folder(label))
        first = ["--config", args.config, "--workdir", folder, "--vqgan.quantizer", quantizer]
        return Row(label, parse_training(Training, [*first, *budget, *flags]).config)
    except (UserError, ValueError) as error:  # shlex raises ValueError for an open quotation mark
        raise UserError(f"in the row '{label}': {error}") from error


def check_protocol(args: Compare, settings: Sequence[str]) -> None:
    """Writes what all rows of a workdir share into it. Raises UserError if earlier rows differ."""
    file = args.workdir / "protocol.json"
    protocol = {"config": args.config, "steps": args.steps, "images": args.images}
    protocol |= {"settings": " ".join(settings)}
    earlier = json.loads(file.read_text()) if file.exists() else protocol
    for name, value in protocol.items():
        if earlier.get(name) != value:
            raise UserError(
                f"the rows in {args.workdir} were made with {name} {earlier.get(name)}, not "
                f"{value}. Use the same value, or another --workdir."
            )
    atomic_write(file, json.dumps(protocol).encode())


def measure(row: Row, images: int | None) -> None:
    """Trains and evaluates a row, and writes its results into its folder."""
    from taming_jax.evaluation.report import evaluate
    from taming_jax.run import load_run
    from taming_jax.training import train
    from taming_jax.training.writers import read_rows

    config, folder = row.config, row.config.folder
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        train(config)
        report = evaluate(load_run(folder), features="vgg", images=images, samples=0)
    log, speeds = (read_rows(folder / "metrics" / f"{x}.jsonl") for x in ("vqgan", "vqgan_speed"))
    result = report["reconstruction"] | {
        "row": row.label,
        "quantizer": config.vqgan.quantizer,
        "codes": config.vqgan.codebook_size,
        "bits per image": report["reconstruction"]["bits_per_pixel"] * config.data.image_size**2,
        "seconds per step": 1 / statistics.median(x["steps_per_second"] for x in speeds),
        "usage_by_step": [(x["step"], x["usage"]) for x in log if x["split"] == "validation"],
    }
    atomic_write(folder / RESULT, json.dumps(result).encode())


def read_results(workdir: Path) -> list[dict[str, Any]]:
    """Returns the results of all rows in a workdir, in the order of the quantizers."""
    results = [json.loads(file.read_text()) for file in workdir.glob(f"*/{RESULT}")]
    order = list(QUANTIZER_CONFIGS)
    return sorted(results, key=lambda x: (order.index(x["quantizer"]), x["row"]))


def format_table(results: list[dict[str, Any]]) -> str:
    """Formats the results of rows as a Markdown table."""
    lines = [
        f"| quantizer | {' | '.join(COLUMNS)} |",
        f"| --- | {' | '.join('---:' for _ in COLUMNS)} |",
    ]
    for result in results:
        # Small images have neither SSIM nor LPIPS.
        values = [f"{result.get(column, math.nan):.4g}" for column in COLUMNS]
        lines.append(f"| {result['row']} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args, settings = parse_known(Compare, __doc__)
    rows = [load_row(args, label, settings) for label in args.quantizers]
    if not rows:
        raise UserError("--quantizers needs at least one row.")
    with folder_lock(args.workdir, "comparing"), report_unwritable(args.workdir, "--workdir"):
        check_protocol(args, settings)
        failed = [row.label for row in rows if not try_row(row, args)]
        results = read_results(args.workdir)
        if results:
            from taming_jax import figures  # slow to import

            curves = {result["row"]: result["usage_by_step"] for result in results}
            title = "Share of codes in use on the validation split"
            figures.plot_curves(curves, args.workdir / "usage.png", title, "share of codes")
            print(format_table(results), end="")
    if failed:
        raise RunFailed(f"these rows failed: {', '.join(failed)}. The others are in the table.")


def try_row(row: Row, args: Compare) -> bool:
    """Trains and evaluates a row unless it is finished, and updates the table. If it fails, prints
    why and returns false."""
    try:
        if not (row.config.folder / RESULT).exists():
            measure(row, args.images)
    except (UserError, RunFailed) as error:
        say(f"The row '{row.label}' failed: {error}", sys.stderr)
        return False
    table = format_table(read_results(args.workdir))
    atomic_write(args.workdir / "comparison.md", table.encode())
    return True
