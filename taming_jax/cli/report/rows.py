"""The rows of `taming-jax benchmark --report`, and the process that measures one of them.

    python -m taming_jax.cli.report.rows NAME ROW JOB

The arguments are JSON; JOB holds the fields of `Job`. The process appends each measurement to
report.jsonl at once, so that a row that is stopped keeps what it has measured.

This module does not import JAX, whose memory would be missing on the GPU for the rows.
"""

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row: the table that shows it, the function that yields its measurements, as `module:name`,
    with its arguments, and the number of seconds that it may take."""

    group: str
    function: str
    arguments: tuple[Any, ...]
    limit: int


# In order of worth, since the report stops when its time is over: what the machine can do, then the
# speed of each stage and of sampling as users run them, then whether the results are right. After
# these come the comparison with PyTorch, the time around the steps, the candidates for changes, and
# float32. Limits are two to three times the expected duration, most of which is compilation.
ROWS = {
    "environment": Row("environment", ".environment:run_environment", (), 60),
    "birds": Row("steps", ".steps:run_vqgan", ("birds", "bfloat16", True), 150),
    "birds-prior": Row("steps", ".steps:run_prior", ("birds", "bfloat16", True), 90),
    "birds-prior-no-dropout": Row("steps", ".steps:run_prior", ("birds", "bfloat16", False), 80),
    "birds-sampling": Row("sampling", ".sampling:run_sampling", ("birds", "bfloat16"), 150),
    "parity": Row("parity", ".parity:run_parity", ("mnist",), 150),
    "mnist": Row("steps", ".steps:run_vqgan", ("mnist", "bfloat16"), 90),
    "birds-torch": Row("steps", ".torch_vqgan:run_vqgan", ("birds", "bfloat16"), 150),
    "birds-prior-torch": Row("steps", ".torch_prior:run_prior", ("birds", "bfloat16", True), 100),
    "mnist-loop": Row("loop", ".loop:run_loop", ("mnist", "vqgan", "bfloat16"), 130),
    "birds-prior-loop": Row("loop", ".loop:run_loop", ("birds", "prior", "bfloat16"), 130),
    "mnist-prior-dispatch": Row("dispatch", ".steps:run_dispatch", ("mnist", "bfloat16"), 100),
    "birds-layers": Row("layers", ".layers:run_layers", ("birds",), 120),
    "birds-sampling-transformers": Row("sampling", ".torch_prior:run_sampling", ("birds",), 150),
    "birds-float32": Row("steps", ".steps:run_vqgan", ("birds", "float32"), 120),
    "birds-prior-float32": Row("steps", ".steps:run_prior", ("birds", "float32", True), 80),
    "mnist-float32": Row("steps", ".steps:run_vqgan", ("mnist", "float32"), 80),
    "birds-torch-float32": Row("steps", ".torch_vqgan:run_vqgan", ("birds", "float32"), 150),
    "birds-prior-torch-float32": Row(
        "steps", ".torch_prior:run_prior", ("birds", "float32", True), 100
    ),
}


def append_line(file: Path, content: dict[str, Any]) -> None:
    """Appends a JSON object to a file of lines."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(content) + "\n")


def measure(name: str, row: Row, job: dict[str, Any]) -> None:
    """Measures a row. Raises UserError if it cannot run on this machine."""
    from taming_jax.cli.report.timing import Job
    from taming_jax.errors import UserError

    module, function = row.function.split(":")
    job = job | {key: job[key] and Path(job[key]) for key in ("out", "golden")}
    try:
        rows = importlib.import_module(module, __spec__.parent)
        entries: Iterable[Any] = getattr(rows, function)(Job(**job), *row.arguments)
        for label, values in entries:
            entry = {"row": name, "group": row.group, "label": label, **values}
            append_line(job["out"] / "report.jsonl", entry)
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed.") from error


def main() -> None:
    name, row, job = map(json.loads, sys.argv[1:])
    measure(name, Row(*row), job)


if __name__ == "__main__":
    from taming_jax.errors import report

    sys.exit(report(main))
