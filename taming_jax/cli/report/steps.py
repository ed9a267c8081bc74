"""The training steps of both stages: their speed, memory, and a trace of the kernels.

`taming-jax benchmark` without --report runs the same measurements for any preset and dataset.
"""

import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from taming_jax.cli.report.timing import (
    CLASSES,
    Entry,
    Job,
    make_random_splits,
    require_gpu,
    time_calls,
)
from taming_jax.cli.report.trace import read_trace, summarize_trace
from taming_jax.config.schema import Config, StageConfig
from taming_jax.data.batches import Feed, ResidentFeed
from taming_jax.data.datasets import Split
from taming_jax.parallel.devices import Compiled, Devices, copy_buffers
from taming_jax.priors.registry import Prior, build_prior
from taming_jax.training.accumulate import count_loop_iterations
from taming_jax.training.dispatch import scan_steps
from taming_jax.training.meter import Meter
from taming_jax.training.prior import init_transformer, train_step
from taming_jax.training.state import TrainState
from taming_jax.training.vqgan import VQGANStage

Step = Callable[[], Any]


def make_step(compiled: Compiled, state: TrainState, feed: Feed) -> Step:
    """Returns a function that takes the next training step and returns its metrics. It keeps the
    state, whose buffers each step donates to the next state."""
    numbers = itertools.count()

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, feed.batch(next(numbers)).arrays)
        return metrics

    return step


def measure_step(
    compiled: Compiled,
    state: TrainState,
    feed: Feed,
    config: Config,
    settings: StageConfig,
    steps: int,
) -> tuple[dict[str, float], Step]:
    """Compiles a training step and measures it. Returns its values, and the step for more calls."""
    start = time.perf_counter()
    compiled.prepare(state, feed.batch(0).arrays)
    compile_seconds = time.perf_counter() - start
    step = make_step(compiled, state, feed)
    values = time_calls(step, steps)
    per_second = 1e3 / values["milliseconds"]
    values |= {"images_per_second": settings.batch_size * per_second}
    flops = compiled.flops and compiled.flops * count_loop_iterations(settings.micro_batches)
    metrics = Meter(jax.local_devices()[0], config, print)(flops, per_second)
    if flops is not None:
        values["gflop_per_device"] = flops / 1e9
        values["tflop_per_second"] = metrics["flops_per_second"] / 1e12
    if "utilisation" in metrics:
        values["share_of_peak"] = metrics["utilisation"]
    values["peak_mib"] = metrics["memory_peak_bytes"] / 2**20
    return values | {"compile_seconds": compile_seconds}, step


def measure_vqgan(
    config: Config, devices: Devices, steps: int, phases: Sequence[bool] = (False, True)
) -> Iterator[tuple[str, dict[str, Any], Step]]:
    """Measures the steps of stage 1 before (False) and after (True) the discriminator starts."""
    stage = VQGANStage(config, devices, restart=True)
    feed, _ = stage.build_feeds()
    # On the host, so that it is not part of the peak memory.
    initial = jax.device_get(stage.init(jax.random.key(0)))
    for adversarial in phases:
        number = stage.start - (not adversarial)
        state = copy_buffers(devices.replicate(initial.replace(step=np.int32(number))))
        compiled = stage.select_step(number)
        values, step = measure_step(compiled, state, feed, config, config.vqgan, steps)
        name = "with discriminator" if adversarial else "autoencoder"
        yield f"{config.config}, stage 1, {name}", values, step


def build_prior_inputs(config: Config, devices: Devices) -> tuple[Prior, ResidentFeed, TrainState]:
    """Returns the prior of a config, a feed of random codes, and an initial state on the host."""
    settings = config.prior
    devices.check_batch("prior", settings.batch_size, settings.micro_batches)
    model = build_prior(config, CLASSES)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, model.codebook_size, (2048, config.grid_size**2)).astype(np.int32)
    split = Split(codes, rng.integers(0, CLASSES, 2048).astype(np.int32))
    feed = ResidentFeed(split, settings.batch_size, 0, devices)
    return model, feed, jax.device_get(init_transformer(config, model, jax.random.key(0)))


def measure_prior(config: Config, devices: Devices, steps: int) -> tuple[str, dict[str, Any], Step]:
    """Measures the step of stage 2 on random codes."""
    model, feed, initial = build_prior_inputs(config, devices)
    function = functools.partial(train_step, config, model, 1000, devices.axis_name)
    compiled = devices.compile(function, donate=True)
    state = copy_buffers(devices.replicate(initial))
    values, step = measure_step(compiled, state, feed, config, config.prior, steps)
    return f"{config.config}, stage 2", values, step


def run_dispatch(job: Job, preset: str, dtype: str) -> Iterator[Entry]:
    """The row of several steps of stage 2 per dispatch: their speed, and how many arrays of the
    state differ from those after single steps, which should be none."""
    require_gpu(job, jax.default_backend() != "cpu")
    config, devices = job.load_config(preset, {"dtype": dtype}), Devices(1)
    model, feed, initial = build_prior_inputs(config, devices)
    step = functools.partial(train_step, config, model, 1000, None)
    sizes = (1, 2, 4) if job.tiny else (1, 8, 32)
    reference: list[np.ndarray] = []
    for size in sizes:
        compiled = devices.compile(step if size == 1 else scan_steps(step), donate=True)
        state = copy_buffers(devices.replicate(initial))
        for start in range(0, sizes[-1], size):
            state, metrics = compiled(state, feed.batch(start, size).arrays)
        leaves = jax.tree.leaves(devices.fetch(state))
        reference = reference or leaves
        pairs = zip(leaves, reference, strict=True)
        different = sum(not np.array_equal(one, other) for one, other in pairs)
        dispatches = max(job.steps // size, 1)
        started = time.perf_counter()
        for number in range(dispatches):
            state, metrics = compiled(state, feed.batch(number * size, size).arrays)
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - started) / (dispatches * size)
        values = {"milliseconds_per_step": 1e3 * seconds, "different_arrays": different}
        yield f"{config.config}, stage 2, {size} per dispatch, {dtype}", values


def describe_config(config: Config, settings: StageConfig) -> str:
    return f"JAX, {config.dtype}, batch {settings.batch_size}"


def run_vqgan(job: Job, preset: str, dtype: str, trace: bool = False) -> Iterator[Entry]:
    """The row of the full step of stage 1, with random images. With `trace`, also lists the longest
    kernels of three steps, and keeps the trace in the output folder."""
    require_gpu(job, jax.default_backend() != "cpu")
    config = job.load_config(preset, {"dtype": dtype, "devices": 1})
    splits = make_random_splits(config)
    with mock.patch("taming_jax.data.datasets.load", lambda data: splits):
        ((label, values, step),) = measure_vqgan(config, Devices(1), job.steps, (True,))
    yield f"{label}, {describe_config(config, config.vqgan)}", values
    if trace:
        for name, values in trace_steps(step, job.out / "trace.json.gz"):
            yield name, values | {"group": "trace"}


def trace_steps(step: Step, file: Path, steps: int = 3) -> list[Entry]:
    """Traces some steps into a file and returns the longest kernels."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls would hide the kernels of small steps
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(steps):
            metrics = step()
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        (written,) = Path(folder).rglob("*.trace.json.gz")
        shutil.copy(written, file)
    return summarize_trace(read_trace(file), steps)


def run_prior(job: Job, preset: str, dtype: str, dropout: bool) -> Iterator[Entry]:
    """The row of the step of stage 2, with the preset's dropout or without."""
    require_gpu(job, jax.default_backend() != "cpu")
    overrides = {"dtype": dtype} | ({} if dropout else {"prior.dropout": 0.0})
    config = job.load_config(preset, overrides)
    label, values, _ = measure_prior(config, Devices(1), job.steps)
    yield (
        f"{label}, dropout {config.prior.dropout}, {describe_config(config, config.prior)}", values
    )  # fmt: skip
