"""Measures a run: its reconstructions, and its samples where it has a prior.

    taming-jax evaluate --workdir runs/mnist --samples 5000 --out eval.json
    taming-jax evaluate --compare one.json other.json

What the figures mean, and against what they are taken: docs/evaluation.md.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taming_jax.cli.arguments import DataFlags, check_output, data_settings, parse
from taming_jax.errors import RunFailed, UserError
from taming_jax.evaluation.protocol import Protocol
from taming_jax.files import check_writable, write_whole


@dataclass(frozen=True, kw_only=True)
class Evaluate(Protocol):
    workdir: Path | None = None
    """The run's folder."""
    compare: tuple[Path, Path] | None = None
    """Two reports, to show side by side."""
    save_reference: Path | None = None
    """Where the split's are written."""
    devices: int | None = None
    """How many to use. Default: all."""
    out: Path | None = None
    """The report, .json."""
    figures: Path | None = None
    """A folder for figures. Default: beside --out."""
    data: DataFlags = field(default_factory=DataFlags)


def main() -> None:
    given = parse(Evaluate, __doc__)
    if given.compare is not None:
        compare(*given.compare)
    elif given.workdir is None:
        raise UserError("name the run by --workdir, or two reports by --compare.")
    else:
        work(given, given.workdir)


def read(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        if not {"features", "reconstruction", "samples", "protocol"} <= set(contents):
            raise ValueError("it has no protocol")
        return contents
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no report of scripts/evaluate.py ({error}).") from error


def compare(left: Path, right: Path) -> None:
    from taming_jax.evaluation.table import compared, differences

    reports = read(left), read(right)
    print(compared(*reports))
    conflicts = differences(*reports)
    if conflicts:
        raise RunFailed(f"these two cannot be compared: {'; '.join(conflicts)}.")
    print("These two can be compared: their protocols are the same.")


def work(given: Evaluate, workdir: Path) -> None:
    for name, file in (("--out", given.out), ("--save-reference", given.save_reference)):
        if file is not None:
            check_output(name, file)
    if given.figures is not None:
        check_writable("--figures", given.figures)
    from taming_jax.evaluation.evaluator import Evaluator
    from taming_jax.evaluation.report import draw, finished
    from taming_jax.evaluation.table import table
    from taming_jax.metrics.distances import save_moments
    from taming_jax.run import load_run
    from taming_jax.training.meter import peak_memory

    start = time.monotonic()
    run = load_run(workdir, data_settings(given.data))
    evaluation = Evaluator(run, given, given.devices, progress=True)
    results = finished(evaluation)
    print(table(results))
    folder = given.figures or (given.out and given.out.absolute().parent)
    try:
        if given.out is not None:
            content = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
            write_whole(given.out, content.encode())
        if given.save_reference is not None:
            if len(evaluation.chosen) < 2:
                raise UserError("--save-reference needs two images at least; take more --images.")
            save_moments(given.save_reference, evaluation.reference.moments)
        if folder is not None:
            folder.mkdir(exist_ok=True)
            draw(evaluation, folder, results)
    except OSError as error:
        raise RunFailed(f"{error.filename or given.out}: {error.strerror or error}.") from error
    memory = peak_memory(evaluation.devices.list[0]) / 2**20
    print(f"{time.monotonic() - start:.0f} s, at most {memory:.0f} MiB.")
