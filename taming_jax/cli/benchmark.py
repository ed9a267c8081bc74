"""Measures how fast a preset trains on this machine, or reports on a whole GPU.

    taming-jax benchmark --config mnist --stage vqgan
    taming-jax benchmark --report --out gpu_report

For each training step (stage 1 has one before and one after the discriminator starts), prints its
duration, images per second, floating-point operations, peak memory, and compile time.

--report measures both stages, sampling, training runs, numerical parity, and counterparts in
PyTorch, on random data. It takes at most 8 minutes (docs/performance.md).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import jax

from taming_jax.cli.arguments import parse
from taming_jax.cli.report.driver import format_table, run_report
from taming_jax.cli.report.steps import measure_prior, measure_vqgan
from taming_jax.cli.report.timing import Entry
from taming_jax.config.load import load_config
from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.parallel.devices import Devices, resolve_dtype


@dataclass(frozen=True)
class DataPath:
    path: str | None = None
    """The folder with the dataset's files. Default: as in the preset."""


@dataclass(frozen=True)
class Benchmark:
    config: str = "mnist"
    """The name of a preset, or the path of a run's config.json."""
    stage: Literal["vqgan", "prior"] = "vqgan"
    """The stage whose training steps are timed."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """The dtype in which the networks compute. Default: as in the preset."""
    batch_size: int | None = None
    """The number of images per step. Default: as in the preset."""
    devices: int | None = None
    """The number of devices to use. Default: all."""
    steps: int = 5
    """The number of times to run each training step."""
    data: DataPath = DataPath()
    report: bool = False
    """Write a report on this machine's GPU instead. The flags above have no effect."""
    out: Path = Path("gpu_report")
    """The folder for the report."""
    golden: Path | None = None
    """The folder with recorded outputs of the official modules, for the report's row parity."""
    tiny: bool = False
    """Report at toy sizes, as a test that also runs on a CPU."""
    rows: tuple[str, ...] = ()
    """The names of the report's rows (docs/performance.md). Default: all rows."""
    seconds: float = 470.0
    """The time that the report may take."""


def measure_steps(config: Config, devices: Devices, stage: str, steps: int) -> Iterator[Entry]:
    """Yields the values of each training step of a stage."""
    if stage == "vqgan":
        for label, values, _ in measure_vqgan(config, devices, steps):
            yield label, values
    else:
        label, values, _ = measure_prior(config, devices, steps)
        yield label, values


def main() -> None:
    args = parse(Benchmark, __doc__)
    if args.report:
        run_report(args.out, args.golden, args.tiny, args.rows, args.seconds)
        return
    for flag, value in (("--steps", args.steps), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be 1 or more.")
    overrides: dict[str, Any] = {"devices": args.devices, "data.path": args.data.path}
    if args.batch_size is not None:
        overrides |= {"vqgan.batch_size": args.batch_size, "prior.batch_size": args.batch_size}
    if args.dtype is not None:
        overrides["dtype"] = args.dtype
    config = load_config(args.config, overrides)
    config = dataclasses.replace(config, dtype=cast(Any, resolve_dtype(config.dtype)))
    devices = Devices(config.devices)
    print(
        f"{args.config}, {args.stage}: batches of {getattr(config, args.stage).batch_size} on "
        f"{len(devices)} {devices.list[0].device_kind} device(s), {config.dtype}, "
        f"jax {jax.__version__}"
    )
    steps = measure_steps(config, devices, args.stage, args.steps)
    print(format_table([{"label": label, **values} for label, values in steps]), end="")
