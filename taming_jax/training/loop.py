"""The one loop that trains either stage: data, steps, validation, checkpoints, figures, log.

It knows a stage only by the protocol in stage.py.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from taming_jax.config.load import differences, read_config, validated, write_config
from taming_jax.config.migrations import RENAMED_METRICS, rename_keys
from taming_jax.config.schema import OF_A_MACHINE, Config, StageConfig
from taming_jax.data.batches import Batch
from taming_jax.errors import Interrupted, RunFailed, UserError, say
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices
from taming_jax.parallel.runtime import prepare
from taming_jax.progress import Progress
from taming_jax.storage import run_lock, usable
from taming_jax.training.checkpoints import FD, Store
from taming_jax.training.log import Log
from taming_jax.training.meter import Meter, Tracer
from taming_jax.training.signals import Signals
from taming_jax.training.stage import Stage
from taming_jax.training.state import TrainState, copy_buffers
from taming_jax.training.weights import (
    describe_loaded,
    describe_other_meaning,
    load_matching_weights,
)
from taming_jax.training.writers import open_writers, read_rows


def check_alike(config: Config) -> None:
    """UserError where another process has other settings or other packages than process 0."""

    def different_settings(one: Config, other: Config) -> list[str]:
        sections = [field.name for field in dataclasses.fields(Config)]
        return differences(one, other, sections, lambda field: field.name not in OF_A_MACHINE)

    distributed.check_equal(config, different_settings)
    distributed.check_equal(distributed.get_versions(), distributed.describe_differences)


def train(kind: Callable[..., Stage], config: Config, restart: bool = False) -> Path:
    """Trains the stage `kind(config, devices, restart)` to its last step, going on from what the
    run's folder holds, unless it begins anew; returns that folder.

    Raises UserError for what the user can mend, before anything of theirs is touched; RunFailed
    where a loss is not finite or the last step could not be saved; Interrupted after SIGINT or
    SIGTERM, saved.
    """
    validated(config)
    folder = config.folder
    with contextlib.ExitStack() as stack:
        signals = Signals()
        stack.callback(signals.restore)
        prepare(config)
        if distributed.process_count() > 1:  # none of them may end before the others
            signals.listen()
        distributed.silence_secondary()
        check_alike(config)
        devices = Devices(config.devices)
        distributed.run_on_primary(lambda: stack.enter_context(run_lock(folder)) and None)
        stage = kind(config, devices, restart)
        config = stage.config
        store = Store(folder, stage.name, stage.best_metric, stage.dataset)

        def begin(template: TrainState) -> Any:
            usable(folder)
            sections, begun = ("seed", "dtype", "data", stage.name), None
            source = getattr(config, stage.name).init_from
            if source is not None and (restart or not store.steps()):
                begun = weights_of(Path(source), stage, config, template)
            if restart:
                store.clear(config, sections)
            return begun or store.restore(template, config, sections, stage.learned)

        try:
            state = stage.init(jax.random.key(config.seed))
            # A fresh state, too, is the first process's: another kind of device may round
            # otherwise. A copy, since the first step gives its state up: what is restored is
            # numpy's memory, and a fresh state is the stage's.
            state = distributed.run_on_primary(lambda: begin(state) or state)
            state = copy_buffers(devices.replicate(state))
            return Loop(stage, store, signals, restart).run(state)
        except OSError as error:
            raise RunFailed(f"{error.filename or folder}: {error.strerror or error}.") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            batch = getattr(config, stage.name).batch_size
            raise RunFailed(
                f"the device's memory does not hold a step of {batch} images; lower "
                f"--{stage.name}.batch-size, raise --{stage.name}.micro-batches, or use more "
                "devices."
            ) from error


def weights_of(source: Path, stage: Stage, config: Config, template: TrainState) -> TrainState:
    """A fresh state with another run's weights, which are described to the user. UserError where
    none of them fit."""
    other = Store(source, stage.name, stage.best_metric).chosen()
    loaded = load_matching_weights(stage.learned, template, other.arrays)
    say(describe_loaded(loaded, source))
    for sentence in describe_other_meaning(
        stage.learned, config, template, other.config, other.arrays
    ):
        say(f"Warning: {sentence}")
    return cast(TrainState, loaded.state)


def with_other_stage(config: Config, stage: str, restart: bool) -> Config:
    """The config as it is written into the run's folder: the section of the stage that is not
    trained now stays as it is there. Only where a run begins anew with stage 1, and has no prior
    yet, it is the given one."""
    prior = Store(config.folder, "prior")
    if restart and stage == "vqgan" and not prior.steps():
        return config
    try:
        written = read_config(config.folder / "config.json")
    except UserError:  # there is none yet, or it is damaged
        return config
    other = "prior" if stage == "vqgan" else "vqgan"
    return dataclasses.replace(config, **{other: getattr(written, other)})


def mean_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the steps in which it is finite. One that is not, in a step that
    was not skipped, only describes the step."""
    means = {}
    for term in dict.fromkeys(term for row in rows for term in row):
        values = [row[term] for row in rows if np.isfinite(row.get(term, np.nan))]
        if values:
            means[term] = float(np.mean(values, dtype=np.float64))
    return means


def derived(term: str) -> tuple[bool, bool]:
    """Sorts a step's metrics: terms first, then sums of them, then gradients of the sums."""
    return term.endswith("_gradient"), term in ("reconstruction_loss", "nll", "loss")


class Loop:
    """The state of one call of `train`."""

    def __init__(self, stage: Stage, store: Store, signals: Signals, restart: bool):
        self.stage, self.config, self.devices = stage, stage.config, stage.devices
        self.store, self.folder, self.signals = store, stage.config.folder, signals
        self.settings: StageConfig = getattr(stage.config, stage.name)
        self.training, self.validation = stage.feeds()
        self.steps = self.settings.total_steps(self.training.size)
        epoch = math.ceil(self.training.size / self.settings.batch_size)
        self.eval_every, self.fd_every = self.settings.eval_every or epoch, self.settings.fd_every
        self.checkpoint_every = self.settings.checkpoint_every or epoch
        self.log_every = self.settings.log_every or max(self.steps // 1000, 1)
        self.draw_every = self.settings.draw_every or max(self.steps // 20, 1)
        self.restart = restart
        self.unsettled: list[tuple[int, dict[str, Any]]] = []
        self.votes: list[jax.Array] = []
        self.skipped = self.skipped_in_a_row = 0

    def run(self, state: TrainState) -> Path:
        start, self.skipped = (int(self.devices.fetch(x)) for x in (state.step, state.skipped))
        folder = self.folder
        if start >= self.steps:
            say(f"{folder} is trained already, to step {start}; see {folder}/figures.")
            return folder
        name, meter = self.stage.name, Meter(self.devices.list[0], self.config, say)
        rows = [
            rename_keys(row, RENAMED_METRICS[name])
            for row in read_rows(folder / "metrics" / f"{name}.jsonl")
        ]
        writers = open_writers(folder, name) if distributed.is_primary() else []
        self.log = Log(name, start, self.steps, rows, writers, meter)
        self.store.say = self.log.say
        if distributed.is_primary():
            write_config(with_other_stage(self.config, name, self.restart), folder / "config.json")
        count, kind = len(self.devices), self.devices.list[0].platform
        of = (
            f" of {distributed.process_count()} processes"
            if distributed.process_count() > 1
            else ""
        )
        self.log.say(
            f"Training stage {self.stage.name} of {self.config.config} into {folder}: "
            f"{self.training.size} images, {self.settings.batch_size} a step, "
            f"step {start + 1} to {self.steps}, on {count} {kind} device{'s' * (count > 1)}{of}. "
            "Compiling takes a while."
        )
        traced = self.settings.profile if distributed.is_primary() else None
        self.tracer = Tracer(traced, folder / "profile", self.log.say)
        with contextlib.ExitStack() as stack:
            for feed in (self.training, self.validation):
                stack.callback(feed.close)
            stack.callback(self.log.close)
            stack.callback(self.store.wait)
            stack.callback(self.tracer.close)
            first = self.training.batch(start)
            with contextlib.closing(self.validation.iterate_once()) as validation:
                batch = next(validation)
            self.stage.compile(state, first, batch)
            self.log.begin()
            self._steps(state, start, first)
        return folder

    def _steps(self, state: TrainState, start: int, first: Batch) -> None:
        self.signals.listen()  # until here nothing is lost where a signal ends the process
        drawn = start
        for step in range(start, self.steps):
            with self.log.waiting():
                batch = self.training.batch(step) if step > start else first
            with self.tracer.step(step + 1):
                state, metrics = self.stage.train_step(state, batch)
            self.tracer.after(step + 1, metrics)
            self.unsettled.append((step + 1, metrics))
            if len(self.unsettled) > 2:
                # A device two steps behind is busy; further behind, only signals would wait.
                jax.block_until_ready(self.unsettled[-3][1])
            done = step + 1
            self.log.advance(done)
            last = done == self.steps
            take_fd = bool(self.fd_every) and (last or done % self.fd_every == 0)
            evaluate = last or take_fd or done % self.eval_every == 0
            save = last or done % self.checkpoint_every == 0
            if evaluate or save or done % self.log_every == 0:
                self._settle()
            chosen = None
            if evaluate:
                sums, found = self._evaluate(state, done, take_fd)
                if take_fd or not self.fd_every:
                    chosen = found
                    self.store.wait()  # for what it took: a best that was lost is not to be beaten
                    best = distributed.run_on_primary(lambda: self.store.best()[1])
                    save = save or self.store.judged(chosen) < best
                # Drawn before it is saved: a run that ends in between is resumed, and draws again.
                # After a signal there is no time for it.
                due = done - drawn >= self.draw_every and self.signals.received is None
                if last or due:
                    drawn = done
                    if self.signals.received is not None:  # at the last step only
                        self._save(state, done, chosen)
                    self._draw(state, sums)
            # A signal may have come at any moment up to here.
            stop = self._stop_signal()
            if save or stop is not None:
                self._settle()
                self._save(state, done, chosen)
            if stop is not None and not last:
                self._require(done)
                raise Interrupted(
                    stop,
                    f"Stopped by {signal.Signals(stop).name} after step {done}, which is saved in "
                    f"{self.store.path}; the same command goes on from there.",
                )
        self._require(self.steps)
        but = f", {self.skipped} of them skipped" if self.skipped else ""
        self.log.say(f"Done: {self.steps} steps{but}. The figures are in {self.folder}/figures.")

    def _stop_signal(self) -> int | None:
        """The signal after which the run ends with this step. Several processes must end with the
        same one: at each they vote, and go by the vote of two steps before, which is known by now,
        so that no device is waited for."""
        if distributed.process_count() == 1:
            return self.signals.received
        self.votes.append(self.devices.reduce_max(self.signals.received or 0))
        if len(self.votes) <= 2:
            return None
        return int(self.devices.fetch(self.votes.pop(0))) or None

    def _save(self, state: TrainState, done: int, chosen: dict[str, float] | None) -> None:
        if distributed.is_primary():
            self.store.save(done, self.devices.fetch(state), self.config, chosen)

    def _require(self, step: int) -> None:
        """Waits, in every process, for the checkpoint of a step. RunFailed where there is none."""
        distributed.run_on_primary(lambda: self.store.require(step))

    def _draw(self, state: TrainState, sums: dict[str, np.ndarray]) -> None:
        if distributed.is_primary():
            with self.log.tolerating(f"The figures in {self.folder / 'figures'}"):
                self.stage.draw(state, self.folder / "figures", sums, self.log.rows)

    def _settle(self) -> None:
        """Reads the metrics of the steps since the last line of the log, says which of them were
        skipped, stops the run where too many were in a row, and logs the means of the others."""
        window = [(step, self.devices.fetch(metrics)) for step, metrics in self.unsettled]
        self.unsettled = []
        if not window:
            return
        taken: list[dict[str, Any]] = []
        broken: list[tuple[int, str]] = []
        for step, metrics in window:
            before, self.skipped = self.skipped, int(metrics["skipped"])
            if self.skipped == before:
                self.skipped_in_a_row = 0
                taken.append(metrics)
                continue
            self.skipped_in_a_row += 1
            terms = [term for term, value in metrics.items() if not np.isfinite(value)]
            broken.append((step, ", ".join(sorted(terms, key=derived))))
            if self.skipped_in_a_row > self.settings.skipped_in_a_row:
                self._stop(*broken[-1])
        if broken:
            (first, terms_of_first), more = broken[0], len(broken) - 1
            also = f", and {more} more up to step {broken[-1][0]}" if more else ""
            self.log.say(f"Step {first} was skipped{also}: not finite in {terms_of_first}.")
        last = window[-1][0]
        means = mean_metrics(taken) | {"skipped": self.skipped}
        self.log.row(last, self._epoch(last), "train", means, self.stage.flops(last - 1))

    def _stop(self, step: int, terms: str) -> None:
        self.store.wait()
        saved, allowed = self.store.steps(), self.settings.skipped_in_a_row
        where = "no checkpoint had been written"
        if saved:
            where = f"the last good checkpoint is {self.store.path / str(saved[-1])}"
        after = f", after {allowed} steps skipped in a row" if allowed else ""
        raise RunFailed(
            f"not finite at step {step}{after}: {terms}; {where}. Lower the learning rate or "
            f"bound the gradients by --{self.stage.name}.grad-clip-norm."
        )

    def _evaluate(
        self, state: TrainState, done: int, take_fd: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        size, sums = self.validation.size, None
        with Progress("validation", size, "images") as progress:
            for batch in self.validation.iterate_once():
                part = self.devices.fetch(self.stage.eval_step(state, batch))
                sums = part if sums is None else jax.tree.map(np.add, sums, part)
                progress.update(self.settings.batch_size)
        assert sums is not None  # a split has an image at least
        metrics = self.stage.summarise(sums)
        if take_fd:
            metrics[FD] = self.stage.distance(state)
        self.log.row(done, self._epoch(done), "validation", metrics)
        return sums, metrics

    def _epoch(self, step: int) -> float:
        return step * self.settings.batch_size / self.training.size
