"""Measures how fast a preset trains on this machine.

    taming-jax benchmark --config mnist --stage vqgan
    taming-jax benchmark --config mnist --stage prior

For each training step (stage 1 has one before and one after the discriminator starts), prints the
compile time, steps and images per second, floating-point operations per step, and peak memory.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from taming_jax.cli.arguments import parse
from taming_jax.config.load import load_config
from taming_jax.config.schema import Config
from taming_jax.data.batches import Feed, ResidentFeed
from taming_jax.data.datasets import Split
from taming_jax.parallel.devices import Compiled, Devices
from taming_jax.priors.registry import build_prior
from taming_jax.training.meter import Meter
from taming_jax.training.prior import init_transformer, train_step
from taming_jax.training.state import copy_buffers
from taming_jax.training.vqgan import VQGANStage

HEADINGS = f"{'step':<26}{'compile':>10}{'steps/s':>10}{'images/s':>10}{'FLOP':>18}  peak memory"


def time_call(function: Callable, *arguments: Any) -> tuple[float, Any]:
    """Returns the duration of a call in seconds, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


def measure_step(
    name: str, step: Compiled, state: Any, feed: Feed, config: Config, devices: Devices, count: int
) -> Any:
    """Compiles a training step, prints its median speed over `count` calls, and returns the state
    after them."""
    compile_seconds, _ = time_call(step.prepare, state, feed.batch(0).arrays)
    times = []
    for number in range(count + 1):
        seconds, (state, _) = time_call(step, state, feed.batch(number).arrays)
        times.append(seconds)
    median = float(np.median(times[1:]))  # the first call warms caches
    device = devices.list[0]
    metrics = Meter(device, config, print)(step.flops, 1 / median)
    operations = f"{(step.flops or 0) * len(devices) / 1e9:>12.2f} GFLOP"
    if "utilisation" in metrics:
        operations += f", {metrics['utilisation']:.0%} of the device's peak"
    memory_kind = "the device" if device.memory_stats() else "the process"
    print(
        f"{name:<26}{compile_seconds:>8.1f} s{1 / median:>10.2f}{feed.batch_size / median:>10.1f}"
        f"{operations}  {metrics['memory_peak_bytes'] / 2**20:.0f} MiB of {memory_kind}"
    )
    return state


def measure_vqgan(config: Config, devices: Devices, count: int) -> None:
    """Measures the training steps of stage 1."""
    stage = VQGANStage(config, devices, restart=True)
    feed, _ = stage.build_feeds()
    state = copy_buffers(devices.replicate(stage.init(jax.random.key(0))))
    print(HEADINGS)
    for number, name in ((stage.start - 1, "autoencoder"), (stage.start, "with discriminator")):
        step = stage.select_step(number)
        state = measure_step(name, step, state, feed, config, devices, count)


def measure_prior(config: Config, devices: Devices, count: int) -> None:
    """Measures the training step of stage 2 on random codes."""
    devices.check_batch("prior", config.prior.batch_size, config.prior.micro_batches)
    model = build_prior(config, 10)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, model.codebook_size, (2048, config.grid_size**2)).astype(np.int32)
    split = Split(codes, rng.integers(0, 10, 2048).astype(np.int32))
    feed = ResidentFeed(split, config.prior.batch_size, 0, devices)
    function = functools.partial(train_step, config, model, 1000, devices.axis_name)
    step = devices.compile(function, donate=True)
    state = copy_buffers(devices.replicate(init_transformer(config, model, jax.random.key(0))))
    print(HEADINGS)
    measure_step("prior", step, state, feed, config, devices, count)


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
    batch_size: int | None = None
    """The number of images per step. Default: as in the preset."""
    devices: int | None = None
    """The number of devices to use. Default: all."""
    steps: int = 5
    """The number of times to run each training step."""
    data: DataPath = DataPath()


def main() -> None:
    args = parse(Benchmark, __doc__)
    overrides: dict[str, Any] = {"devices": args.devices, "data.path": args.data.path}
    if args.batch_size is not None:
        overrides |= {"vqgan.batch_size": args.batch_size, "prior.batch_size": args.batch_size}
    config = load_config(args.config, overrides)
    devices = Devices(config.devices)
    print(
        f"{args.config}, {args.stage}: batches of {getattr(config, args.stage).batch_size} on "
        f"{len(devices)} {devices.list[0].device_kind} device(s), {config.dtype}, "
        f"jax {jax.__version__}"
    )
    measure = {"vqgan": measure_vqgan, "prior": measure_prior}[args.stage]
    measure(config, devices, args.steps)
