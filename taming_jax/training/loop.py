"""The training loop of both stages: data, steps, validation, checkpoints, figures, and the log.

The loop uses a stage only through the interface in stage.py.
"""

import contextlib
import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from taming_jax.config.load import diff_configs, read_config, write_config
from taming_jax.config.migrations import RENAMED_METRICS, rename_keys
from taming_jax.config.schema import MACHINE_SETTINGS, Config, StageConfig
from taming_jax.config.serialization import to_dict
from taming_jax.config.validation import validate_config
from taming_jax.data.batches import Batch
from taming_jax.errors import Interrupted, RunFailed, UserError, say
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices, copy_buffers
from taming_jax.parallel.runtime import prepare
from taming_jax.progress import Progress
from taming_jax.storage import create_run_folders, folder_lock
from taming_jax.training.cadences import Cadences
from taming_jax.training.checkpoints import FD, Store
from taming_jax.training.dispatch import count_steps
from taming_jax.training.log import Log, average_metrics, metric_order
from taming_jax.training.meter import Meter, Tracer
from taming_jax.training.signals import Signals
from taming_jax.training.stage import Stage, report_failures
from taming_jax.training.state import Metrics, TrainState
from taming_jax.training.weights import (
    describe_loaded,
    describe_mismatches,
    load_matching_weights,
)
from taming_jax.training.writers import (
    Writer,
    check_destinations,
    close_writers,
    open_writers,
    read_rows,
)

CHECKPOINT_SECONDS = 600  # a checkpoint is written if the last one is older


def check_processes(config: Config) -> None:
    """Raises UserError if another process has other settings or packages than process 0."""

    def compare_settings(one: Config, other: Config) -> list[str]:
        sections = [field.name for field in dataclasses.fields(Config)]
        return diff_configs(one, other, sections, lambda field: field.name not in MACHINE_SETTINGS)

    distributed.check_equal(config, compare_settings)
    distributed.check_equal(distributed.get_versions(), distributed.describe_differences)


def train(build_stage: Callable[..., Stage], config: Config, restart: bool = False) -> Path:
    """Trains the stage `build_stage(config, devices, restart)` to its last step and returns the
    run's folder. Resumes the run in the folder, or starts over with `restart`.

    Raises UserError for problems that you can fix, before it changes any of your files, and
    RunFailed if losses are not finite or the last step cannot be saved. After SIGINT or SIGTERM,
    saves a checkpoint and raises Interrupted.
    """
    validate_config(config)
    check_destinations(config)
    folder = config.folder
    with contextlib.ExitStack() as stack:
        signals = Signals()
        stack.callback(signals.restore)
        prepare(config)
        if distributed.process_count() > 1:  # so that no process ends before the others
            signals.listen()
        distributed.silence_secondary()
        check_processes(config)
        devices = Devices(config.devices)
        distributed.run_on_primary(lambda: stack.enter_context(folder_lock(folder)) and None)
        stage = build_stage(config, devices, restart)
        config = stage.config
        store = Store(
            folder, stage.name, stage.best_metric, stage.dataset, stage.frozen, devices.describe()
        )

        writers: list[Writer] = []
        stack.callback(close_writers, writers)
        distributed.run_on_primary(
            lambda: writers.extend(open_writers(config, stage.name, restart or not store.steps()))
        )

        def load_state(template: TrainState) -> Any:
            create_run_folders(folder)
            sections, initial = ("seed", "dtype", "data", stage.name), None
            source = getattr(config, stage.name).init_from
            if source is not None and (restart or not store.steps()):
                initial = load_initial_weights(Path(source), stage, config, template)
            if restart:
                store.clear(config, sections)
            return initial or store.restore(template, config, sections, stage.learned)

        with report_failures(folder, stage):
            state = stage.init(jax.random.key(config.seed))
            # All processes use the primary's state even if it is fresh, since another kind of
            # device may round differently. Copy it because the first step donates its buffers,
            # which may belong to numpy or to the stage.
            state = distributed.run_on_primary(lambda: load_state(state) or state)
            state = copy_buffers(devices.replicate(state))
            return Loop(stage, store, signals, writers, restart).run(state)


def load_initial_weights(
    source: Path, stage: Stage, config: Config, template: TrainState
) -> TrainState:
    """Returns a fresh state with the weights of another run, and prints which weights it loads.
    Raises UserError if no weights match."""
    other = Store(source, stage.name, stage.best_metric).load_best()
    loaded = load_matching_weights(stage.learned, template, other.arrays)
    say(describe_loaded(loaded, source))
    for sentence in describe_mismatches(
        stage.learned, config, stage.frozen, other.config, other.arrays
    ):
        say(f"Warning: {sentence}")
    return cast(TrainState, loaded.state)


def keep_other_stage(config: Config, stage: str, restart: bool) -> Config:
    """Returns the config to write into the run's folder: the section of the stage that is not being
    trained keeps the values stored there. The exception is a restart of stage 1 in a run without a
    prior, which uses the given config."""
    prior = Store(config.folder, "prior")
    if restart and stage == "vqgan" and not prior.steps():
        return config
    try:
        stored = read_config(config.folder / "config.json")
    except UserError:  # the file does not exist yet, or is damaged
        return config
    other = "prior" if stage == "vqgan" else "vqgan"
    return dataclasses.replace(config, **{other: getattr(stored, other)})


class Loop:
    """The training loop of one call to `train`."""

    def __init__(
        self,
        stage: Stage,
        store: Store,
        signals: Signals,
        writers: Sequence[Writer],
        restart: bool,
    ):
        self.stage, self.config, self.devices = stage, stage.config, stage.devices
        self.store, self.signals, self.writers = store, signals, writers
        self.folder, self.restart = stage.config.folder, restart
        self.settings: StageConfig = getattr(stage.config, stage.name)
        self.training, self.validation = stage.build_feeds()
        self.steps = self.settings.total_steps(self.training.size)
        self.cadences = Cadences.choose(self.settings, self.training.size)
        self.pending: list[tuple[range, Metrics]] = []
        self.first_step: dict[str, float] | None = None  # since the last checkpoint; for `verify`
        self.signal_maxima: list[jax.Array] = []
        self.skipped = self.skipped_in_a_row = 0

    def run(self, state: TrainState) -> Path:
        """Trains from `state` to the last step and returns the run's folder."""
        start, self.skipped = (int(self.devices.fetch(x)) for x in (state.step, state.skipped))
        folder = self.folder
        if start >= self.steps:
            say(f"The run in {folder} is already trained to step {start}; see {folder}/figures.")
            return folder
        name, meter = self.stage.name, Meter(self.devices.list[0], self.config, say)
        rows = [
            rename_keys(row, RENAMED_METRICS[name])
            for row in read_rows(folder / "metrics" / f"{name}.jsonl")
        ]
        self.log = Log(name, start, self.steps, rows, self.writers, meter)
        self.log.log_text("config", json.dumps(to_dict(self.config), indent=1))
        self.store.say = self.log.say
        if distributed.is_primary():
            write_config(keep_other_stage(self.config, name, self.restart), folder / "config.json")
        count, platform = len(self.devices), self.devices.list[0].platform
        processes = (
            f" of {distributed.process_count()} processes"
            if distributed.process_count() > 1
            else ""
        )
        self.log.say(
            f"Training stage {self.stage.name} of {self.config.config} in {folder}: "
            f"{self.training.size} images, {self.settings.batch_size} per step, "
            f"steps {start + 1} to {self.steps}, on {count} {platform} "
            f"device{'s' * (count > 1)}{processes} in {self.config.dtype}. Compilation takes a "
            "while."
        )
        profile_steps = self.settings.profile if distributed.is_primary() else None
        self.tracer = Tracer(profile_steps, folder / "profile", self.log.say)
        with contextlib.ExitStack() as stack:
            for feed in (self.training, self.validation):
                stack.callback(feed.close)
            stack.callback(self.log.close)
            stack.callback(self.store.wait)
            stack.callback(self.tracer.close)
            first = self.training.batch(start)
            with contextlib.closing(self.validation.iterate_once()) as validation:
                batch = next(validation)
            firsts = [first]
            if (size := self.stage.steps_per_dispatch) > 1:
                firsts.append(self.training.batch(start, size))
            self.stage.compile(state, firsts, batch)
            self.log.start_progress()
            self._run_steps(state, start, first)
        return folder

    def _run_steps(self, state: TrainState, start: int, first: Batch) -> None:
        self.signals.listen()  # until now, ending the process loses nothing
        done = last_drawn = self.saved_step = start
        self.last_saved = time.monotonic()
        profile = self.settings.profile or (1, 0)
        stops = (profile[0] - 1, profile[1], self.steps)
        while done < self.steps:
            count = count_steps(done, self.stage.steps_per_dispatch, self.cadences.periods, stops)
            with self.log.measure_waiting():
                batch = first if (done, count) == (start, 1) else self.training.batch(done, count)
            with self.tracer.step(done + 1):
                state, metrics = self.stage.train_step(state, batch)
            self.pending.append((range(done + 1, done + count + 1), metrics))
            done += count
            self.tracer.end_step(done, metrics)
            if len(self.pending) > 2:
                # Let the device lag by two calls at most: that keeps it busy, and a longer queue
                # would only delay the reaction to signals.
                jax.block_until_ready(self.pending[-3][1])
            self.log.advance(done)
            last = done == self.steps
            every = self.cadences.distance
            measure_fd = every is not None and (last or done % every == 0)
            evaluate = last or measure_fd or done % self.cadences.validate == 0
            save = last or done % self.cadences.save == 0
            if evaluate or save or done % self.cadences.log == 0:
                self._log_pending()
            score_metrics = None
            if evaluate:
                sums, validation_metrics = self._evaluate(state, done, measure_fd)
                if measure_fd or every is None:
                    score_metrics = validation_metrics
                    self.store.wait()  # a best checkpoint whose save failed must not count as best
                    best = distributed.run_on_primary(lambda: self.store.best()[1])
                    save = save or self.store.score(score_metrics) < best
                # Draw before saving: if the run ends in between, the resumed run draws again. After
                # a signal there is no time to draw, except at the last step.
                due = done - last_drawn >= self.cadences.draw and self.signals.received is None
                if last or due:
                    last_drawn = done
                    if self.signals.received is not None:
                        self._save(state, done, score_metrics)
                    self._draw_figures(state, done, sums)
            # Check for signals last, since they can arrive at any time before this.
            stop = self._agree_on_signal()
            if save or stop is not None:
                self._log_pending()
            # The clock may add a checkpoint at a step that has a row in the log: if the run resumes
            # from it, its rows are the same. It never adds a validation, which would make the
            # choice of the best checkpoint depend on the speed of the machine.
            overdue = time.monotonic() - self.last_saved >= CHECKPOINT_SECONDS
            if save or stop is not None or (overdue and not self.pending):
                self._save(state, done, score_metrics)
            if stop is not None and not last:
                self._require_checkpoint(done)
                raise Interrupted(
                    stop,
                    f"Stopped by {signal.Signals(stop).name} after step {done}, which is saved in "
                    f"{self.store.path}. Run the same command (without --restart) to resume.",
                )
        self._require_checkpoint(self.steps)
        skipped = f", {self.skipped} of them skipped" if self.skipped else ""
        self.log.close_progress()
        self.log.say(
            f"Done: {self.steps} steps{skipped}. The figures are in {self.folder}/figures."
        )

    def _agree_on_signal(self) -> int | None:
        """Returns the signal that ends the run after this step, or None.

        Several processes must stop after the same step. They exchange their signals at each step,
        and use the result from two steps before, which is known by now, so no process waits for a
        device."""
        if distributed.process_count() == 1:
            return self.signals.received
        self.signal_maxima.append(self.devices.reduce_max(self.signals.received or 0))
        if len(self.signal_maxima) <= 2:
            return None
        return int(self.devices.fetch(self.signal_maxima.pop(0))) or None

    def _save(self, state: TrainState, done: int, metrics: dict[str, float] | None) -> None:
        """Saves a checkpoint. All metrics up to its step must have been logged."""
        self.last_saved, self.saved_step = time.monotonic(), done
        if distributed.is_primary():
            snapshot = self.devices.snapshot(state)
            self.store.save(done, snapshot, self.config, metrics, first_step=self.first_step)

    def _require_checkpoint(self, step: int) -> None:
        """Waits, in every process, for a step's checkpoint. Raises RunFailed if it is missing."""
        distributed.run_on_primary(lambda: self.store.require(step))

    def _draw_figures(self, state: TrainState, done: int, sums: dict[str, np.ndarray]) -> None:
        if distributed.is_primary():
            folder = self.folder / "figures"
            with self.log.tolerate_write_errors(f"The figures in {folder}"):
                self.stage.draw_figures(state, folder, sums, self.log.rows)
                self.log.log_figures(done, [folder / name for name in self.stage.figures])

    def _log_pending(self) -> None:
        """Fetches the metrics of the steps since the last row of the log, and logs their means.
        Reports skipped steps, and raises RunFailed if too many in a row were skipped."""
        window = self._fetch_pending()
        if not window:
            return
        finite: list[dict[str, Any]] = []
        skipped: list[tuple[int, str]] = []
        for step, metrics in window:
            if step == self.saved_step + 1:
                finite_values = {k: float(x) for k, x in metrics.items() if np.isfinite(x)}
                self.first_step = {"step": step, **finite_values}
            previous, self.skipped = self.skipped, int(metrics["skipped"])
            if self.skipped == previous:
                self.skipped_in_a_row = 0
                finite.append(metrics)
                continue
            self.skipped_in_a_row += 1
            names = [name for name, value in metrics.items() if not np.isfinite(value)]
            skipped.append((step, ", ".join(sorted(names, key=metric_order))))
            if self.skipped_in_a_row > self.settings.skipped_in_a_row:
                self._raise_not_finite(*skipped[-1])
        if skipped:
            (first, first_names), more = skipped[0], len(skipped) - 1
            also = f", and {more} more up to step {skipped[-1][0]}" if more else ""
            self.log.say(f"Step {first} was skipped{also}: non-finite values in {first_names}.")
        last = window[-1][0]
        means = average_metrics(finite) | {"skipped": self.skipped}
        self.log.log_metrics(
            last, self._epoch(last), "train", means, self.stage.count_flops(last - 1)
        )

    def _fetch_pending(self) -> list[tuple[int, dict[str, Any]]]:
        """Returns the pending steps and their metrics, which are then no longer pending."""
        pending, self.pending = self.pending, []
        window: list[tuple[int, dict[str, Any]]] = []
        for names, group in itertools.groupby(pending, key=lambda item: item[1].names):
            steps, metrics = zip(*group, strict=True)
            rows = self.devices.fetch_rows([x.values for x in metrics], len(names))
            all_steps = itertools.chain.from_iterable(steps)
            window += zip(all_steps, Metrics(rows, names).unpack(), strict=True)
        return window

    def _raise_not_finite(self, step: int, names: str) -> None:
        self.store.wait()
        saved, allowed = self.store.steps(), self.settings.skipped_in_a_row
        checkpoint = "there is no checkpoint"
        if saved:
            checkpoint = f"the last good checkpoint is {self.store.path / str(saved[-1])}"
        after = f", after {allowed} skipped steps in a row" if allowed else ""
        raise RunFailed(
            f"non-finite values at step {step}{after}: {names}; {checkpoint}. Start over with "
            f"--restart and a lower learning rate, or with --{self.stage.name}.grad-clip-norm."
        )

    def _evaluate(
        self, state: TrainState, done: int, measure_fd: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Validates the state and logs the metrics. Returns the sums over the split and the
        metrics."""
        sums: dict[str, np.ndarray] = {}
        previous: dict[str, jax.Array] = {}
        with Progress("validation", self.validation.size, "images") as progress:

            def add(batch_sums: dict[str, jax.Array]) -> None:
                for name, value in self.devices.fetch(batch_sums).items():
                    sums[name] = sums[name] + value if name in sums else value
                progress.update(self.settings.batch_size)

            for batch in self.validation.iterate_once():
                batch_sums = self.stage.eval_step(state, batch)
                if previous:  # fetch its sums while the device computes those of this batch
                    add(previous)
                previous = batch_sums
            add(previous)
        metrics = self.stage.summarize(sums)
        if measure_fd:
            metrics[FD] = self.stage.compute_fd(state)
        self.log.log_metrics(done, self._epoch(done), "validation", metrics)
        return sums, metrics

    def _epoch(self, step: int) -> float:
        return step * self.settings.batch_size / self.training.size
