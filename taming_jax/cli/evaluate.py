"""Evaluates a run: its reconstructions and, if it has a prior, its samples.

    taming-jax evaluate --workdir runs/mnist --samples 5000
    taming-jax evaluate --compare one.json other.json

docs/evaluation.md explains the metrics.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from taming_jax.cli.arguments import DataFlags, check_output, collect_data_settings, parse
from taming_jax.errors import RunFailed, UserError
from taming_jax.evaluation.protocol import Protocol
from taming_jax.storage import atomic_write, check_writable


@dataclass(frozen=True, kw_only=True)
class Evaluate(Protocol):
    workdir: Path | None = None
    """The run's folder."""
    compare: tuple[Path, Path] | None = None
    """Two reports to print side by side."""
    save_reference: Path | None = None
    """The FILE.npz for the mu and sigma of the split."""
    devices: int | None = None
    """The number of devices to use. Default: all."""
    out: Path | None = None
    """The FILE.json for the report. Default: evaluation.json in the run's folder."""
    figures: Path | None = None
    """The folder for figures. Default: the folder of --out, or else that of the run's figures."""
    data: DataFlags = field(default_factory=DataFlags)


def main() -> None:
    args = parse(Evaluate, __doc__)
    if args.compare is not None:
        compare(*args.compare)
    elif args.workdir is None:
        raise UserError("name a run with --workdir, or two reports with --compare.")
    else:
        evaluate_run(args, args.workdir)


def compare(left: Path, right: Path) -> None:
    """Prints two reports side by side. Raises RunFailed if their protocols differ."""
    from taming_jax.evaluation.table import find_differences, format_comparison, read_report

    reports = read_report(left), read_report(right)
    print(format_comparison(*reports))
    conflicts = find_differences(*reports)
    if conflicts:
        raise RunFailed(f"the reports cannot be compared: {'; '.join(conflicts)}.")
    print("The reports can be compared: their protocols are the same.")


def evaluate_run(args: Evaluate, workdir: Path) -> None:
    """Evaluates a run, prints the report, and writes it, its figures, and the reference."""
    from taming_jax.evaluation.table import REPORT, format_report

    out = args.out or workdir / REPORT
    figures = args.figures or (out.absolute().parent if args.out else workdir / "figures")
    for name, file in (("--out", out), ("--save-reference", args.save_reference)):
        if file is not None and workdir.is_dir():
            check_output(name, file)
    if args.figures is not None:
        check_writable("--figures", args.figures)
    from taming_jax.evaluation.evaluator import Evaluator
    from taming_jax.evaluation.report import build_report, save_figures
    from taming_jax.metrics.distances import save_moments
    from taming_jax.run import load_run
    from taming_jax.training.meter import peak_memory

    start = time.monotonic()
    run = load_run(workdir, collect_data_settings(args.data))
    evaluator = Evaluator(run, args, args.devices, progress=True)
    report = build_report(evaluator)
    print(format_report(report))
    try:
        content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        atomic_write(out, content.encode())
        if args.save_reference is not None:
            if len(evaluator.images) < 2:
                raise UserError("--save-reference needs at least two images; increase --images.")
            save_moments(args.save_reference, evaluator.reference.moments)
        figures.mkdir(exist_ok=True)
        save_figures(evaluator, figures, report)
    except OSError as error:
        raise RunFailed(f"{error.filename or out}: {error.strerror or error}.") from error
    memory = peak_memory(evaluator.devices.list[0]) / 2**20
    print(f"{time.monotonic() - start:.0f} s, peak memory {memory:.0f} MiB.")
