"""Where the time of a training run goes: real runs on random data for a while."""

import contextlib
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from taming_jax.cli.report.timing import (
    Entry,
    Job,
    make_random_params,
    make_random_splits,
    require_gpu,
)
from taming_jax.config.schema import Config
from taming_jax.data.datasets import Split, Splits
from taming_jax.errors import Interrupted
from taming_jax.models.vqgan import build_vqgan
from taming_jax.training import loop
from taming_jax.training.prior import PriorStage
from taming_jax.training.vqgan import VQGANStage

SECONDS, TINY_SECONDS = 40.0, 8.0
COMPILATION = "/jax/core/compile/"  # the start of the names of JAX's events


class Clock:
    """The time that each activity takes, and how often it happens, until `stop`.

    The time of an activity excludes compilation, and activities that happen during it.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.compiled = self._excluded = 0.0
        self._started: float | None = None
        self._elapsed: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop_after(self, seconds: float) -> bool:
        """Stops the clock after a time. Returns whether it has stopped."""
        assert self._started is not None
        elapsed = time.perf_counter() - self._started
        if self._elapsed is None and elapsed >= seconds:
            self._elapsed = elapsed
        return self._elapsed is not None

    def is_running(self) -> bool:
        return self._started is not None and self._elapsed is None

    def exclude_compilation(self, event: str, duration_secs: float, **_: Any) -> None:
        """Listens to JAX's events. The durations of nested tracing overlap and are left out."""
        if self.is_running() and event.startswith(COMPILATION) and "trace" not in event:
            self.compiled += duration_secs
            self._excluded += duration_secs

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter() - self._excluded
        yield
        if self.is_running():
            duration = time.perf_counter() - self._excluded - start
            self._excluded += duration
            self.seconds[name] += duration
            self.counts[name] += 1

    def wrap(self, name: str, function: Callable) -> Callable:
        """Returns a function that measures its calls."""

        def measured(*arguments: Any, **settings: Any) -> Any:
            with self.measure(name):
                return function(*arguments, **settings)

        return measured

    def summarize(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields each activity's share of the time without compilation."""
        assert self._elapsed is not None
        total = self._elapsed - self.compiled
        for name in ("steps", "saving"):
            self.seconds[name] += self.seconds.pop(f"end of {name}", 0.0)
        self.seconds["other"] = total - sum(self.seconds.values())
        for name in ("steps", "validation", "saving", "figures", "waiting", "other"):
            values: dict[str, Any] = {"share": self.seconds[name] / total}
            if count := self.counts[name]:
                values |= {"count": count, "milliseconds": 1e3 * self.seconds[name] / count}
            yield name, values
        yield "compilation, left out", {"milliseconds": 1e3 * self.compiled}


def make_timed_loop(clock: Clock, seconds: float) -> type[loop.Loop]:
    """Returns a training loop that measures its activities and stops after `seconds`."""

    class TimedLoop(loop.Loop):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self._take_step = self.stage.train_step
            for owner, method, function, activity in (
                (self, "_evaluate", self._evaluate, "validation"),
                (self, "_draw_figures", self._draw_figures, "figures"),
                (self, "_save", self._save, "saving"),
                (self.store, "wait", self.store.wait, "end of saving"),
                (self.training, "batch", self.training.batch, "waiting"),
                (self.stage, "train_step", self._train_step, "steps"),
            ):
                setattr(owner, method, clock.wrap(activity, function))

        def _run_steps(self, *arguments: Any) -> None:
            clock.start()
            super()._run_steps(*arguments)

        def _train_step(self, *arguments: Any) -> Any:
            results = self._take_step(*arguments)
            # The loop waits for the same step next; here, the time counts as that of a step.
            jax.block_until_ready([metrics for _, metrics in self.pending[-2:-1]])
            return results

        def _log_pending(self) -> None:
            with clock.measure("end of steps"):
                jax.block_until_ready([metrics for _, metrics in self.pending])
            super()._log_pending()

        def _agree_on_signal(self) -> int | None:
            return signal.SIGTERM if clock.stop_after(seconds) else None

    return TimedLoop


def run_loop(job: Job, preset: str, stage: str, dtype: str) -> Iterator[Entry]:
    """The row of a training run of 40 seconds. Stage 2 trains on random codes."""
    require_gpu(job, jax.default_backend() != "cpu")
    clock, overrides = Clock(), {"dtype": dtype, "devices": 1}
    if stage == "vqgan":
        overrides["vqgan.discriminator_start_step"] = 0
    if job.tiny:
        overrides[f"{stage}.draw_every"] = 4
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = job.load_config(preset, overrides | {"workdir": folder})
        seconds = TINY_SECONDS if job.tiny else SECONDS
        timed = make_timed_loop(clock, seconds)
        stack.enter_context(mock.patch.object(loop, "Loop", timed))
        replace_data(stack, config, stage, job)
        jax.monitoring.register_event_duration_secs_listener(clock.exclude_compilation)
        stack.enter_context(contextlib.suppress(Interrupted))
        loop.train(VQGANStage if stage == "vqgan" else PriorStage, config)
    for name, values in clock.summarize():
        yield f"{preset}, {stage}, {dtype}: {name}", values


def replace_data(stack: contextlib.ExitStack, config: Config, stage: str, job: Job) -> None:
    """Replaces the dataset with random images of the usual number, and what stage 2 takes from
    stage 1, the generator and the codes, with random ones."""
    counts = {"mnist": (57_000, 3_000), "birds": (5_694, 300)}[config.config]
    if job.tiny:
        counts = 8, 8
    if stage == "vqgan":
        splits = make_random_splits(config, *counts)
        stack.enter_context(mock.patch("taming_jax.data.datasets.load", lambda data: splits))
        return

    splits, data = make_small_splits(config, *counts), config.data
    image = (1, data.image_size, data.image_size, data.channels), "float32"
    params = make_random_params(build_vqgan(config), image)

    def draw_codes(_: Any, name: str, split: Split, version: int = 0) -> Split:
        shape = len(split.images), config.grid_size**2
        codes = np.random.default_rng(version).integers(0, config.vqgan.codebook_size, shape)
        return Split(codes.astype(np.min_scalar_type(config.vqgan.codebook_size - 1)), split.labels)

    for target, replacement in (
        ("taming_jax.data.datasets.load", lambda data: splits),
        ("taming_jax.training.prior.load_generator", lambda *_: (params, config, None)),
        ("taming_jax.training.tokens.Tokenizer.__call__", draw_codes),
    ):
        stack.enter_context(mock.patch(target, replacement))


def make_small_splits(config: Config, train: int, validation: int) -> Splits:
    """Returns a dataset whose training images, which stage 2 does not read, are small."""
    full = make_random_splits(config, 1, validation)
    images = np.zeros((train, 1, 1, config.data.channels), np.uint8)
    return full._replace(
        train=Split(images, np.arange(train, dtype=np.int32) % len(full.class_names))
    )
