#!/usr/bin/env python3
"""Trains and measures the variations of docs/recipes.md, and prints their rows.

    python scripts/recipes.py --workdir runs/recipes                 all of them, some hours
    python scripts/recipes.py --workdir runs/recipes --rows LeCAM    one, and what it varies

A row that was measured before is printed again; one that was interrupted goes on.
"""

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from taming_jax.files import write_whole

ROOT = Path(__file__).parents[1]
PRESET = "mnist_tiny"
PROTOCOL = ["--features", "vgg", "--split", "test", "--images", "2000", "--samples", "2000"]


class Row(NamedTuple):
    """Settings of stage 1, of a prior where `of` is a stage 1, of sampling where it is a prior."""

    settings: str = ""
    of: str = ""


LATE = "--vqgan.discriminator-start 0.75"
BEFORE = f"{LATE} --vqgan.code-dim 8"  # as the preset was before this table
ROWS = {
    "mnist_tiny": Row(),
    "late": Row(LATE),
    "codes of 8": Row("--vqgan.code-dim 8"),
    "before": Row(BEFORE),
    "before, 32 codes": Row(f"{BEFORE} --vqgan.codebook-size 32"),
    "before, 512 codes": Row(f"{BEFORE} --vqgan.codebook-size 512"),
    "before, not normalised": Row(f"{BEFORE} --vqgan.no-l2-normalise"),
    "fixed weight": Row("--vqgan.no-adaptive-weight"),
    "LeCAM": Row("--vqgan.lecam-weight 0.1"),
    "no average": Row("--vqgan.ema-decay None"),
    "DiffAugment": Row("--vqgan.diff-augment translation cutout"),
    "seed 1": Row("--seed 1"),
    "prior": Row(of="mnist_tiny"),
    "prior before": Row(of="before"),
    "guidance 0, before": Row("--guidance-scale 0", "prior before"),
    "guidance 1, before": Row("--guidance-scale 1", "prior before"),
    "guidance 1.5, before": Row("--guidance-scale 1.5", "prior before"),
    "guidance 3, before": Row("--guidance-scale 3", "prior before"),
    "dropout": Row("--prior.dropout 0.1", "mnist_tiny"),
}
COLUMNS = {
    "reconstruction": ("psnr", "ssim", "lpips", "fd", "usage", "perplexity"),
    "samples": ("fd", "kd", "precision", "recall", "coverage", "accuracy"),
}


def run(script: str, *arguments: str) -> None:
    """A command of this repository, as scripts/cpu.sh sets up a CPU. Leaves where it fails."""
    command = shlex.join([sys.executable, script, *arguments])
    print(command, file=sys.stderr, flush=True)
    setup = f"set -e; . {shlex.quote(str(ROOT / 'scripts' / 'cpu.sh'))}; exec {command}"
    if code := subprocess.run(["bash", "-c", setup], cwd=ROOT, check=False).returncode:
        sys.exit(code)


def measured(name: str, workdir: Path) -> dict[str, Any]:
    """A row's report, with the seconds its training took, where that was not interrupted; trained
    and measured if it is not yet."""
    row, file, folder = ROWS[name], workdir / f"{name}.json", workdir / name
    if file.exists():
        return json.loads(file.read_text())
    script, sampling, settings = "", [], row.settings.split()
    if not row.of:
        script, log = "train_vqgan.py", folder / "metrics" / "vqgan.jsonl"
    elif not ROWS[row.of].of:
        measured(row.of, workdir)
        script, log = "train_prior.py", folder / "metrics" / "prior.jsonl"
        if not folder.exists():
            shutil.rmtree(workdir / "copying", ignore_errors=True)
            shutil.copytree(workdir / row.of, workdir / "copying")
            (workdir / "copying").rename(folder)
    else:
        measured(row.of, workdir)
        folder, sampling = workdir / row.of, settings
    seconds = 0.0
    if script:
        begun, fresh = time.monotonic(), not log.exists()
        run(script, "--config", PRESET, "--workdir", str(folder), *settings)
        seconds = time.monotonic() - begun if fresh else math.nan
    out = workdir / "report.json"
    run("scripts/evaluate.py", "--workdir", str(folder), *PROTOCOL, *sampling, "--out", str(out))
    found = json.loads(out.read_text()) | {"seconds": seconds}
    write_whole(file, json.dumps(found).encode())
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """A row of a table in Markdown."""
    kind = "samples" if ROWS[name].of else "reconstruction"
    values = [f"{found[kind][column]:.3g}" for column in COLUMNS[kind]]
    settings = f"`{ROWS[name].settings}`" if ROWS[name].settings else ""
    return f"| {name} | {settings} | {' | '.join(values)} | {found['seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    given = parser.parse_args()
    workdir = given.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    for kind, columns in COLUMNS.items():
        names = [name for name in given.rows if bool(ROWS[name].of) == (kind == "samples")]
        if names:
            print("| row | settings |", " | ".join(columns), "| seconds |")
            print("| --- | --- |", " | ".join("---:" for _ in columns), "| ---: |", flush=True)
        for name in names:
            print(line(name, measured(name, workdir)), flush=True)


if __name__ == "__main__":
    main()
