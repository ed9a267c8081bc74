"""Measures a run: its reconstructions, and its samples where it has a prior.

    taming-jax evaluate --workdir runs/mnist --samples 5000 --out eval.json
    taming-jax evaluate --workdir runs/mnist --sweep guidance-scale 1 1.5 2 3
    taming-jax evaluate --compare one.json other.json

What the figures mean, and against what they are taken: docs/evaluation.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from taming_jax.cli.arguments import add_data_flags, add_flags, data_settings, processes
from taming_jax.config.schema import OF_A_MACHINE
from taming_jax.errors import RunFailed, UserError

# What may differ from process to process.
OWN = {"process_id", "workdir", "weights", "reference", *(f"data.{name}" for name in OF_A_MACHINE)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", help="the run's folder")
    parser.add_argument("--compare", nargs=2, metavar="JSON", help="two reports side by side")
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument(
        "--images", type=int, help="how many of the split, evenly spread (default: all)"
    )
    parser.add_argument("--samples", type=int, default=5000, help="0 leaves them out")
    parser.add_argument(
        "--features", default="auto", help="inception, vgg, classifier; auto: inception, else vgg"
    )
    parser.add_argument("--weights", type=Path, help="InceptionV3's, pytorch-fid's .pth")
    parser.add_argument("--reference", type=Path, help=".npz of mu and sigma, for the split's")
    parser.add_argument("--save-reference", type=Path, help="where the split's are written")
    parser.add_argument("--legacy-resize", action="store_true", help="bilinear, as the first FID")
    parser.add_argument("--kept", type=int, default=10_000, help="features held, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--guidance-scale", type=float, nargs="+")
    parser.add_argument("--sweep", nargs="+", metavar="guidance-scale", help="and its values")
    parser.add_argument("--devices", type=int, help="how many to use (default: all)")
    parser.add_argument("--out", type=Path, help="the report, .json")
    parser.add_argument("--figures", type=Path, help="a folder for figures; beside --out if not")
    add_data_flags(parser)
    add_flags(parser)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.compare:
        compare(*map(Path, given.compare))
        return
    if given.workdir is None:
        raise UserError("name the run by --workdir, or two reports by --compare.")
    from taming_jax.parallel.distributed import join

    join(processes(given))
    work(given)


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


def scales_of(sweep: list[str] | None) -> list[float]:
    """The values of --sweep. UserError for another setting, or what is no number."""
    if not sweep:
        return []
    name, *values = sweep
    if name.replace("_", "-") != "guidance-scale" or not values:
        raise UserError("--sweep takes guidance-scale and its values, such as 1 1.5 2 3.")
    try:
        return [float(value) for value in values]
    except ValueError as error:
        raise UserError(f"--sweep guidance-scale: {error}.") from error


def scale_of(given: list[float] | None) -> float | tuple[float, float] | None:
    if given is None:
        return None
    if len(given) > 2:
        raise UserError("--guidance-scale takes one number, or two: the first code's, the last's.")
    return given[0] if len(given) == 1 else (given[0], given[1])


def check_outputs(given: argparse.Namespace) -> None:
    """UserError where what is asked for cannot be written. Makes the folder of the figures."""
    from taming_jax.files import check_writable

    for name in ("out", "save_reference"):
        file = getattr(given, name)
        if file is not None:
            flag = f"--{name.replace('_', '-')}"
            if file.is_dir():
                raise UserError(f"{flag} {file} is a folder; name a file in it.")
            check_writable(flag, file)
    if given.figures is not None:
        try:
            given.figures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--figures {given.figures}: {error.strerror or error}.") from error
        check_writable("--figures", given.figures)


def work(given: argparse.Namespace) -> None:
    from taming_jax.parallel import distributed

    distributed.one_speaks()
    distributed.check_same_flags({name: x for name, x in vars(given).items() if name not in OWN})
    sweep, scale = scales_of(given.sweep), scale_of(given.guidance_scale)
    distributed.from_first(lambda: check_outputs(given))
    from taming_jax.evaluation.report import draw, finished
    from taming_jax.evaluation.subject import Evaluation, Protocol
    from taming_jax.evaluation.table import table
    from taming_jax.metrics.distances import save_moments
    from taming_jax.run import load_run
    from taming_jax.training.meter import peak_memory

    begun = time.monotonic()
    names = (
        "split", "images", "samples", "features", "weights", "reference", "legacy_resize", "kept",
        "seed", "temperature", "top_k", "top_p",
    )  # fmt: skip
    protocol = Protocol(**{name: getattr(given, name) for name in names}, guidance_scale=scale)
    run = load_run(given.workdir, data_settings(given))
    evaluation = Evaluation(run, protocol, given.devices, progress=True, sweep=sweep)
    results = finished(evaluation)
    print(table(results))
    folder = given.figures or (given.out.absolute().parent if given.out else None)
    try:
        if given.out is not None:
            distributed.from_first(lambda: write(given.out, results))
        if given.save_reference is not None and len(evaluation.chosen) < 2:
            raise UserError("--save-reference needs two images at least; take more --images.")
        if given.save_reference is not None:
            moments = evaluation.reference.moments
            distributed.from_first(lambda: save_moments(given.save_reference, moments))
        if folder is not None:
            draw(evaluation, folder, results)
    except OSError as error:
        raise RunFailed(f"{error.filename or given.out}: {error.strerror or error}.") from error
    memory = peak_memory(evaluation.devices.list[0]) / 2**20
    print(f"{time.monotonic() - begun:.0f} s, at most {memory:.0f} MiB.")


def write(file: Path, results: dict[str, Any]) -> None:
    from taming_jax.files import write_whole

    write_whole(file, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
