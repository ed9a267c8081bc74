"""Measures a run: its reconstructions, and its samples where it has a prior.

    taming-jax evaluate --workdir runs/mnist --samples 5000 --out eval.json
    taming-jax evaluate --workdir runs/mnist --sweep guidance-scale 1 1.5 2 3
    taming-jax evaluate --compare one.json other.json

What the figures mean, and against what they are taken: docs/evaluation.md.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taming_jax.cli.arguments import DataFlags, check_output, data_settings, join_processes, parse
from taming_jax.config.schema import OF_A_MACHINE
from taming_jax.errors import RunFailed, UserError
from taming_jax.evaluation.protocol import Protocol
from taming_jax.files import check_writable, write_whole
from taming_jax.parallel.distributed import Processes

# What may differ from process to process.
OWN = {"process_id", "workdir", "weights", "reference", *(f"data.{name}" for name in OF_A_MACHINE)}


@dataclass(frozen=True, kw_only=True)
class Evaluate(Protocol, Processes):
    workdir: Path | None = None
    """The run's folder."""
    compare: tuple[Path, Path] | None = None
    """Two reports, to show side by side."""
    save_reference: Path | None = None
    """Where the split's are written."""
    sweep: tuple[str, ...] = ()
    """guidance-scale and values of it, to measure samples at as well."""
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


def scales_of(sweep: tuple[str, ...]) -> list[float]:
    """The values of --sweep. Raises UserError where it names another setting, or no numbers."""
    try:
        scales = [float(value) for value in sweep[1:]]
    except ValueError:
        scales = []
    if sweep and (sweep[0] != "guidance-scale" or not scales):
        raise UserError("--sweep takes guidance-scale and its values, such as 1 1.5 2 3.")
    return scales


def check_outputs(given: Evaluate) -> None:
    """UserError where what is asked for cannot be written. Makes the folder of the figures."""
    for name, file in (("--out", given.out), ("--save-reference", given.save_reference)):
        if file is not None:
            check_output(name, file)
    if given.figures is not None:
        try:
            given.figures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--figures {given.figures}: {error.strerror}.") from error
        check_writable("--figures", given.figures)


def work(given: Evaluate, workdir: Path) -> None:
    from taming_jax.parallel import distributed

    join_processes(given, OWN)
    sweep = scales_of(given.sweep)
    distributed.from_first(lambda: check_outputs(given))
    from taming_jax.evaluation.report import draw, finished
    from taming_jax.evaluation.subject import Evaluation
    from taming_jax.evaluation.table import table
    from taming_jax.metrics.distances import save_moments
    from taming_jax.run import load_run
    from taming_jax.training.meter import peak_memory

    begun = time.monotonic()
    run = load_run(workdir, data_settings(given.data))
    evaluation = Evaluation(run, given, given.devices, progress=True, sweep=sweep)
    results = finished(evaluation)
    print(table(results))
    out, reference = given.out, given.save_reference
    folder = given.figures or (out and out.absolute().parent)
    try:
        if out is not None:
            content = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
            distributed.from_first(lambda: write_whole(out, content.encode()))
        if reference is not None:
            if len(evaluation.chosen) < 2:
                raise UserError("--save-reference needs two images at least; take more --images.")
            moments = evaluation.reference.moments
            distributed.from_first(lambda: save_moments(reference, moments))
        if folder is not None:
            draw(evaluation, folder, results)
    except OSError as error:
        raise RunFailed(f"{error.filename or out}: {error.strerror or error}.") from error
    memory = peak_memory(evaluation.devices.list[0]) / 2**20
    print(f"{time.monotonic() - begun:.0f} s, at most {memory:.0f} MiB.")
