"""The checkpoints that generator, discriminator and transformer share, written by Orbax.

A stage's checkpoints are in `checkpoints/NAME/STEP`. Each is one commit of two items: `state`, the
arrays by their names, and `about`, which holds its format, the hash of each array, the config, the
metrics, and the fingerprint of the dataset. Orbax makes a commit complete or absent, but restores a
flipped byte silently: hence the hashes.
"""

import contextlib
import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from taming_jax.config.load import differences, settings
from taming_jax.config.migrations import ARRAYS, FORMAT, MICRO_BATCHES, format_of, migrated
from taming_jax.config.schema import Config
from taming_jax.config.serialization import to_dict
from taming_jax.data.datasets import unlike
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.files import text_hash
from taming_jax.training.orbax_handlers import ALONE, arrays_handler, describe_failure
from taming_jax.training.weights import describe_loaded, load_matching_weights
from taming_jax.weights.arrays import digest, fill, named_arrays

FD = "fd_vgg16"  # a Fréchet distance: a validation that has it is judged by it


def keep_settings(run: Path) -> str:
    """Returns a sentence that tells how to resume with the settings of a run."""
    folder = shlex.quote(str(run))
    return (
        "Give the settings that the run was created with, or use all of them with "
        f"--config {shlex.quote(str(run / 'config.json'))} --workdir {folder}."
    )


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its step, its arrays by name, the config it was trained with, the
    fingerprint of its dataset (data/datasets.py; None where it has none), whether it holds weights
    only, and the format it was written in."""

    step: int
    arrays: dict[tuple[str, ...], np.ndarray]
    config: Config
    dataset: dict[str, Any] | None
    weights_only: bool
    format: int

    @property
    def nets(self) -> dict[str, Any]:
        """The arrays of each network as nested dictionaries."""
        return traverse_util.unflatten_dict(self.arrays)["nets"]

    @property
    def generator(self) -> Any:
        """The generator's parameters to evaluate with: the moving average where there is one."""
        net = self.nets["generator"]
        return net.get("ema", net["params"])


class Store:
    """The checkpoints of one stage in a run's folder: the last two and the best. Best is the lowest
    Fréchet distance where the run measures it, else the lowest `best_metric`.

    `dataset` is the fingerprint (data/datasets.py) of the training data: each checkpoint keeps it,
    and a resumed run must have the same. `say` is called with a sentence where a checkpoint is
    damaged or could not be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        best_metric: str = "nll",
        dataset: dict[str, Any] | None = None,
    ):
        self.run, self.path = folder, folder.absolute() / "checkpoints" / name
        self._best_metric, self._dataset = best_metric, dataset
        self._writing: tuple[int, ocp.AsyncCheckpointer] | None = None
        self._failure = ""
        self.say: Callable[[str], None] = say

    def judged(self, metrics: dict[str, float]) -> float:
        """The metric of a validation by which checkpoints are compared."""
        return float(metrics.get(FD, metrics[self._best_metric]))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if p.name.isdigit())

    def last_config(self) -> Config | None:
        """The config of the newest undamaged checkpoint of training; None where there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(ValueError):
                about = self._about(step)
                if not about.get("weights_only"):
                    return self._config(about, step)
        return None

    def best(self) -> tuple[int | None, float]:
        """The step of the best checkpoint and its metric; None and infinity where no checkpoint was
        validated."""
        values = {}
        for step in self.steps():
            with contextlib.suppress(ValueError):
                if (metrics := self._about(step)["metrics"]) is not None:
                    values[step] = self.judged(metrics)
        best = min(values, key=lambda step: values[step], default=None)
        return (None, math.inf) if best is None else (best, values[best])

    def save(
        self,
        step: int,
        state: Any,
        config: Config,
        metrics: dict[str, float] | None,
        weights_only: bool = False,
    ) -> None:
        """Starts to write a checkpoint of numpy arrays; `wait`, or the next save, waits for the
        disk. A step that has a checkpoint already keeps it. `weights_only` marks a checkpoint that
        a run starts from, with new optimizers.

        A checkpoint that cannot be written is reported by `say`; complete ones stay, and the next
        save is tried as usual.
        """
        self.wait()
        if step in self.steps():
            return
        arrays = {path: np.asarray(x) for path, x in named_arrays(state).items()}
        about: dict[str, Any] = {
            "format": FORMAT,
            "hashes": {"/".join(path): digest(array) for path, array in arrays.items()},
            "config": to_dict(config),
            "metrics": metrics,
            "dataset": self._dataset,
        }
        if weights_only:
            about["weights_only"] = True
        about["hash"] = text_hash(about)
        handler = ocp.CompositeCheckpointHandler(
            state=arrays_handler(),
            about=ocp.JsonCheckpointHandler(multiprocessing_options=ALONE),
            composite_options=ocp.CompositeOptions(multiprocessing_options=ALONE),
        )
        checkpointer = ocp.AsyncCheckpointer(
            handler,
            # Otherwise threads wait for minutes for a folder that could not be made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=ALONE,
        )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays)),
            about=ocp.args.JsonSave(about),
        )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_partial()
            checkpointer.save(self.path / str(step), args=items)
            self._writing = step, checkpointer
        except (OSError, ValueError, RuntimeError) as error:
            self._report(step, error)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on disk, or reports that it is not;
        deletes those that are neither among the last two nor the best."""
        if self._writing is None:
            return
        (step, checkpointer), self._writing = self._writing, None
        try:
            checkpointer.wait_until_finished()
            checkpointer.close()
            for old in set(self.steps()[:-2]) - {self.best()[0]}:
                shutil.rmtree(self.path / str(old))
        except (OSError, ValueError, RuntimeError) as error:  # a full disk alone raises all of them
            self._report(step, error)

    def _remove_partial(self) -> None:
        """Deletes what is left of saves that failed or were killed."""
        for partial in self.path.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _report(self, step: int, error: Exception) -> None:
        self._failure = describe_failure(error)
        self._remove_partial()
        if step not in self.steps():  # else an old checkpoint could not be deleted
            self.say(
                f"The checkpoint of step {step} could not be written to {self.path} "
                f"({self._failure}); the run goes on, and the next one is tried."
            )

    def require(self, step: int) -> None:
        """Waits for the checkpoint of a step. Raises RunFailed where it could not be written."""
        self.wait()
        steps = self.steps()
        if step not in steps:
            before = f"the last one is of step {steps[-1]}" if steps else "there is none before it"
            raise RunFailed(
                f"the checkpoint of step {step} could not be written to {self.path} "
                f"({self._failure}), {before}. Make room, or fix what the message names; the same "
                "command resumes."
            )

    def _about(self, step: int) -> dict[str, Any]:
        """A checkpoint's description. Raises ValueError where it is damaged, and UserError where it
        is intact but of a newer version of this program: every format has the same hash."""
        folder = self.path / str(step)
        if not (folder / "_CHECKPOINT_METADATA").exists():
            raise ValueError("it is not complete")
        try:
            about = json.loads((folder / "about" / "metadata").read_text(encoding="utf-8"))
            expected = about.pop("hash")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if text_hash(about) != expected:
            raise ValueError("its description is not what was saved")
        format_of(about, folder)
        return about

    def _config(self, about: dict[str, Any], step: int) -> Config:
        """The config of a checkpoint. Raises UserError where it has settings that this version does
        not know."""
        folder = self.path / str(step)
        try:
            return settings(about["config"], format_of(about, folder))
        except UserError as error:
            raise UserError(
                f"{folder} was written by another version of this program: {error}"
            ) from error

    def read(self, step: int) -> Checkpoint:
        """Reads a checkpoint.

        Raises ValueError, with what is wrong, where the checkpoint is damaged, and UserError where
        it is intact but of another version of this program.
        """
        folder = self.path / str(step)
        about = self._about(step)
        try:
            tree = ocp.Checkpointer(arrays_handler(), multiprocessing_options=ALONE).restore(
                folder / "state"
            )
            arrays = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(tree).items()}
        except Exception as error:  # damage raises many kinds, none documented
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if {"/".join(path) for path in arrays} != set(about["hashes"]):
            raise ValueError("it does not hold the arrays that were saved")
        for path, array in arrays.items():
            if digest(array) != about["hashes"]["/".join(path)]:
                raise ValueError(f"the array {'.'.join(path)} is not what was saved")
        number = format_of(about, folder)
        return Checkpoint(
            step, migrated(arrays, number, ARRAYS), self._config(about, step),
            about.get("dataset"), about.get("weights_only", False), number,
        )  # fmt: skip

    def readable(self, steps: Iterable[int]) -> Iterator[Checkpoint]:
        """The undamaged checkpoints of some steps; damaged ones are reported. Raises UserError as
        `read`."""
        for step in steps:
            try:
                yield self.read(step)
            except ValueError as error:
                self.say(f"The checkpoint {self.path / str(step)} is damaged: {error}.")

    def _first_readable(self, steps: Iterable[int], advice: str = "") -> Checkpoint:
        """The first undamaged checkpoint of some steps. Raises UserError where all are damaged."""
        for checkpoint in self.readable(steps):
            return checkpoint
        raise UserError(
            f"every checkpoint in {self.path} is damaged; restore one from a backup{advice}."
        )

    def chosen(self) -> Checkpoint:
        """The best checkpoint (the newest where none was validated), or where it is damaged the
        newest that can be read. Raises UserError where there is none."""
        steps, best = self.steps(), self.best()[0]
        if not steps:
            raise UserError(
                f"{self.run} holds no {self.path.name} checkpoint; train one with "
                f"train_{self.path.name}.py."
            )
        order = dict.fromkeys([*([] if best is None else [best]), *reversed(steps)])
        return self._first_readable(order)

    def restore(
        self, template: Any, config: Config, sections: tuple[str, ...], learned: tuple[str, ...]
    ) -> Any | None:
        """The newest undamaged checkpoint as a state like `template`, or None where there is none
        at all; of a checkpoint with weights only those of the networks that are `learned`. Damaged
        ones are reported, and moved aside so that their steps can be saved again.

        Raises UserError where the checkpoints are of a run that trains something else, or where
        none of them can be read.
        """
        steps = self.steps()
        if not steps:
            return None
        checkpoint = self._first_readable(reversed(steps), ", or start over with --restart")
        self._check_same(checkpoint, config, sections)
        for damaged in steps[steps.index(checkpoint.step) + 1 :]:
            self.say(f"The damaged one was moved to {self._move(damaged, 'damaged')}.")
        if checkpoint.step != steps[-1]:
            self.say(f"The one before it, of step {checkpoint.step}, is used.")
        if not checkpoint.weights_only:
            return fill(template, checkpoint.arrays)
        loaded = load_matching_weights(learned, template, checkpoint.arrays)
        self.say(describe_loaded(loaded, self.run))
        return loaded.state

    def _check_same(
        self, checkpoint: Checkpoint, config: Config, sections: tuple[str, ...]
    ) -> None:
        different = differences(config, checkpoint.config, sections)
        if different:
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(different)}. "
                f"{keep_settings(self.run)} Otherwise choose another --workdir, or begin anew with "
                "--restart."
            )
        parts = checkpoint.config.vqgan.micro_batches
        if self.path.name == "vqgan" and parts > 1 and checkpoint.format < MICRO_BATCHES:
            raise UserError(
                f"{self.path} holds a run with --vqgan.micro-batches {parts} of an older version, "
                "which computed one adaptive weight for all of them. This one would train it "
                "differently: choose another --workdir, or begin anew with --restart."
            )
        others = unlike(self._dataset, checkpoint.dataset)
        if others:
            raise UserError(
                f"{self.path} holds a run on other data: {'; '.join(others)}. Name the same data "
                "by --data.path, or use another --workdir, or --restart to begin anew."
            )

    def _move(self, step: int, why: str) -> Path:
        """Moves a checkpoint aside and returns its new place."""
        place = self.path.with_name(f"{self.path.name}-{why}") / str(step)
        while place.exists():
            place = place.with_name(place.name + "-again")
        place.parent.mkdir(exist_ok=True)
        return (self.path / str(step)).rename(place)

    def clear(self, config: Config, sections: tuple[str, ...]) -> None:
        """Deletes this stage's checkpoints, for a run that begins anew, and nothing else. One with
        weights only stays, since the run starts from it, or is moved aside where it has other
        settings; so is a folder that is not a complete checkpoint."""
        for step in self.steps():
            try:
                about = self._about(step)
            except ValueError:
                self._move(step, "damaged")
                continue
            if not about.get("weights_only"):
                shutil.rmtree(self.path / str(step))
            elif differences(config, self._config(about, step), sections):
                self._move(step, "weights-only")
