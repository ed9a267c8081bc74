"""How fast a preset trains on this machine.

    taming-jax benchmark --config mnist --stage vqgan
    taming-jax benchmark --config mnist --stage prior
    taming-jax benchmark --stage sample
    taming-jax benchmark --config birds --stage data --data.path FOLDER

The first prints, for the step before and after the discriminator's start: compile time, steps and
images per second, floating-point operations per step, and peak memory. `--stage sample` times the
sampling of grids of 16x16 codes by a prior of 8 layers of width 256. `--stage data` times how
pictures are decoded, by one core into a cache of its own, and how they are then streamed from there
to the devices.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.cli.arguments import parse
from taming_jax.config.load import load_config
from taming_jax.config.schema import Config
from taming_jax.data import datasets
from taming_jax.data.batches import Feed, ResidentFeed, StreamingFeed
from taming_jax.data.datasets import Split
from taming_jax.parallel.devices import Compiled, Devices
from taming_jax.priors.autoregressive import GPT
from taming_jax.training.meter import Meter
from taming_jax.training.prior import fresh_transformer, training_step
from taming_jax.training.state import copied
from taming_jax.training.vqgan import VQGANStage


def timed(function: Callable, *arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def rates(step: Compiled, median: float, config: Config, devices: Devices) -> str:
    """A step's operations, how much of what a device can do they are, and its peak memory."""
    device = devices.list[0]
    used = Meter(device, config, print)(step.flops, 1 / median)
    text = f"{(step.flops or 0) * len(devices) / 1e9:>12.2f} GFLOP"
    if "utilisation" in used:
        text += f", {used['utilisation']:.0%} of a device's most"
    where = "the device" if device.memory_stats() else "the process"
    return f"{text}  {used['memory_peak_bytes'] / 2**20:.0f} MiB of {where}"


def median_step(step: Compiled, state: Any, feed: Feed, steps: int) -> tuple[float, Any]:
    """Seconds a step, and the state afterwards."""
    times = []
    for number in range(steps + 1):
        arrays = feed.batch(number).arrays
        begin = time.perf_counter()
        state, metrics = step(state, arrays)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])), state  # the first warms caches


def measure(stage: VQGANStage, devices: Devices, steps: int) -> None:
    batch_size = stage.config.vqgan.batch_size
    feed, _ = stage.feeds()
    state = copied(devices.replicate(stage.init(jax.random.key(0))))
    print(f"{'step':<26}{'compile':>10}{'steps/s':>10}{'images/s':>10}{'a step':>18}  peak memory")
    for adversarial, name in ((False, "autoencoder"), (True, "with discriminator")):
        step = stage.compiled(adversarial)
        begin = time.perf_counter()
        step.prepare(state, feed.batch(0).arrays)
        compile_time = time.perf_counter() - begin
        median, state = median_step(step, state, feed, steps)
        print(
            f"{name:<26}{compile_time:>8.1f} s{1 / median:>10.2f}{batch_size / median:>10.1f}"
            f"{rates(step, median, stage.config, devices)}"
        )


def measure_prior(config: Config, devices: Devices, steps: int) -> None:
    """The training step of stage 2 on codes made up for it."""
    devices.check_batch("prior", config.prior.batch_size, config.prior.micro_batches)
    model = GPT.build(config, 10)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, model.codebook_size, (2048, model.length)).astype(np.int32)
    split = Split(codes, rng.integers(0, 10, 2048).astype(np.int32))
    batch_size = config.prior.batch_size
    feed = ResidentFeed(split, batch_size, 0, devices)
    function = functools.partial(training_step, config, model, 1000, devices.axis_name)
    step = devices.compile(function, donate=True)
    state = copied(devices.replicate(fresh_transformer(config, model, jax.random.key(0))))
    step.prepare(state, feed.batch(0).arrays)
    median, _ = median_step(step, state, feed, steps)
    print(
        f"{1 / median:.2f} steps/s, {batch_size / median:.1f} images/s, "
        f"{rates(step, median, config, devices).lstrip()}"
    )


def measure_sampling(repeats: int) -> None:
    """Sampling of 256 positions by 8 layers of width 256."""
    model = GPT(codebook_size=1024, classes=10, grid=(16, 16), layers=8, heads=8, width=256)
    tokens = jnp.zeros((1, model.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    @jax.jit
    def cached(labels: jax.Array, keys: jax.Array) -> jax.Array:
        return model.sample(params, labels, keys)

    times: dict[int, list[float]] = {8: [], 64: []}
    for _ in range(repeats + 1):  # in turn, so that a slow moment meets both
        for batch, taken in times.items():
            keys = jax.random.split(jax.random.key(1), batch)
            taken.append(timed(cached, jnp.arange(batch) % 10, keys))
    seconds = {batch: float(np.median(taken[1:])) for batch, taken in times.items()}
    for batch, (first, *_) in times.items():
        print(
            f"batch {batch}: {seconds[batch]:.2f} s, {batch / seconds[batch]:.2f} images/s "
            f"(and {first - seconds[batch]:.1f} s to compile)"
        )
    growth = 8 * np.median(np.divide(times[8][1:], times[64][1:]))
    print(f"throughput grows {growth:.2f} times from batch 8 to 64")


def measure_data(config: Config, devices: Devices, steps: int) -> None:
    """Decoding, from the source to the cache, and streaming from the cache."""
    with tempfile.TemporaryDirectory() as cache:
        data = dataclasses.replace(config.data, cache=cache, workers=1)
        begin = time.perf_counter()
        splits = datasets.load(data)
        seconds = time.perf_counter() - begin
        count = sum(len(split.images) for split in splits[:3])
        print(f"decoding: {count / seconds:.0f} pictures a second, one core")
        batch_size = config.vqgan.batch_size
        feed = StreamingFeed(splits.train, batch_size, 0, devices)
        count = max(steps, -(-2 * len(splits.train.images) // batch_size))
        jax.block_until_ready(feed.batch(0).arrays)
        begin = time.perf_counter()
        for step in range(1, count + 1):
            jax.block_until_ready(feed.batch(step).arrays)
        seconds = time.perf_counter() - begin
        feed.close()
        size = splits.train.images.shape[1]
        print(
            f"streaming: {count * batch_size / seconds:.0f} images of {size}x{size} a second, in "
            f"batches of {batch_size}"
        )


@dataclass(frozen=True)
class DataPath:
    path: str | None = None
    """Local files, in place of the preset's download."""


@dataclass(frozen=True)
class Benchmark:
    config: str = "mnist"
    stage: Literal["vqgan", "prior", "sample", "data"] = "vqgan"
    batch_size: int | None = None
    """Default: the preset's."""
    devices: int | None = None
    steps: int = 5
    """Timed steps of each kind."""
    data: DataPath = DataPath()


def main() -> None:
    given = parse(Benchmark, __doc__)
    overrides: dict[str, Any] = {"devices": given.devices, "data.path": given.data.path}
    if given.batch_size is not None:
        overrides |= {"vqgan.batch_size": given.batch_size, "prior.batch_size": given.batch_size}
    config = load_config(given.config, overrides)
    devices = Devices(config.devices)
    sizes = {"vqgan": config.vqgan.batch_size, "prior": config.prior.batch_size}
    what = {stage: f"{given.config}, {stage}: batches of {size}" for stage, size in sizes.items()}
    print(
        f"{what.get(given.stage, given.stage)} on {len(devices)} {devices.list[0].device_kind} "
        f"device(s), {config.dtype}, jax {jax.__version__}"
    )
    if given.stage == "sample":
        measure_sampling(given.steps)
    elif given.stage == "data":
        measure_data(config, devices, given.steps)
    elif given.stage == "prior":
        measure_prior(config, devices, given.steps)
    else:
        measure(VQGANStage(config, devices), devices, given.steps)
