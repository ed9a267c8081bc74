"""The Orbax store that generator, discriminator and transformer share.

A stage's checkpoints lie in `checkpoints/NAME/STEP`, each one commit of two items: `state`, the
arrays by their names, and `about`, its format, the hash of each array, the config, and what the
dataset is known by. Orbax makes a commit whole or not at all, but restores a flipped byte without a
word: hence the hashes.
"""

import contextlib
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy

from taming_jax.config.load import differences, settings
from taming_jax.config.migrations import ARRAYS, FORMAT, MICRO_BATCHES, format_of, migrated
from taming_jax.config.schema import Config
from taming_jax.config.serialization import to_dict
from taming_jax.data.datasets import unlike
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.files import text_hash
from taming_jax.training.handlers import (
    ALONE,
    arrays_handler,
    arrays_to_save,
    describe_failure,
    json_handler,
    sparing_handler,
)
from taming_jax.training.weights import begun_whole, said
from taming_jax.weights.arrays import digest, fill, named_arrays

FD = "fd_vgg16"  # a Fréchet distance: where a validation took it, checkpoints are judged by it


def keep_settings(run: Path) -> str:
    """A sentence that tells how to go on with the settings that a run has."""
    folder = shlex.quote(str(run))
    return (
        "Leave these settings out; where a preset has changed since the run was created, take "
        f"--config {shlex.quote(str(run / 'config.json'))} --workdir {folder} in its place."
    )


class Checkpoint(NamedTuple):
    """A checkpoint's arrays by name, the config it was trained with, the identity
    (data/datasets.py) of the dataset it was trained on, where it keeps one, whether it holds
    weights only, with which a run begins, and the format that it was written in."""

    arrays: dict[tuple[str, ...], np.ndarray]
    config: Config
    dataset: dict[str, Any] | None
    weights_only: bool = False
    format: int = FORMAT


class Store:
    """The checkpoints of one stage in a run's folder: the last two, and the best by `monitor`, or
    by the Fréchet distance where the run takes it (lower is better). `dataset` is the identity
    (data/datasets.py) of what the stage trains on, which each checkpoint keeps, and a resumed run
    has to equal. An `imported` one takes weights only, which may be a mapped file larger than
    memory. `say` is called with a sentence where a checkpoint is damaged, or could not be
    written."""

    def __init__(
        self,
        folder: Path,
        name: str,
        monitor: str,
        read_only: bool = False,
        dataset: dict[str, Any] | None = None,
        imported: bool = False,
    ):
        self._read_only, self._dataset, self._imported = read_only, dataset, imported
        self.path = folder.absolute() / "checkpoints" / name
        self._monitor = monitor
        self._manager: ocp.CheckpointManager | None = None
        self._under_way = 0  # the step that was begun last
        self._lowest: float | None = None
        self._trouble = ""
        self.say: Callable[[str], None] = say

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            keep = preservation_policy.AnyPreservationPolicy([
                preservation_policy.LatestN(2),
                preservation_policy.BestN(
                    get_metric_fn=self.judged, reverse=True, n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ])  # fmt: skip
            self.path.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep, best_fn=self.judged, best_mode="min",
                    read_only=self._read_only, enable_async_checkpointing=True,
                    create=False, multiprocessing_options=ALONE,
                    cleanup_tmp_directories=not self._read_only,
                    # Else threads wait for minutes for a folder that could not be made.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
                item_handlers={
                    "state": sparing_handler() if self._imported else arrays_handler(),
                    "about": json_handler(),
                },
            )  # fmt: skip
        return self._manager

    def judged(self, metrics: Any) -> float:
        """What of a validation a checkpoint is judged by."""
        return float(metrics.get(FD, metrics[self._monitor]))

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        return [step for step in self._folders() if self._ended(step)]

    def _folders(self) -> list[int]:
        """The steps that Orbax counts on, by the names of folders alone."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if p.name.isdigit())

    def _ended(self, step: int) -> bool:
        return (self.path / str(step) / "_CHECKPOINT_METADATA").exists()

    def last_config(self) -> Config | None:
        """The config of the newest checkpoint that is not damaged and not of an import; None where
        there is none."""
        for step in reversed(self.steps()):
            try:
                about = self._about(step)
            except ValueError:
                continue
            if not about.get("weights_only"):
                return self._config(about, step)
        return None

    def _config(self, about: dict[str, Any], step: int) -> Config:
        """The config that a checkpoint was trained with. UserError where it has settings that this
        version does not know."""
        folder = self.path / str(step)
        try:
            return settings(about["config"], format_of(about, folder))
        except UserError as error:
            raise UserError(
                f"{folder} was written by another version of this program: {error}"
            ) from error

    def best(self) -> tuple[int | None, float]:
        """The step of the best checkpoint and its monitored value; None and infinity where no
        checkpoint was validated."""
        values = {}
        for step in self.steps():
            try:
                metrics = self._about(step)["metrics"]
            except ValueError:
                continue
            if metrics is not None:
                values[step] = self.judged(metrics)
        best = min(values, key=lambda step: values[step], default=None)
        return (None, math.inf) if best is None else (best, values[best])

    @property
    def lowest(self) -> float:
        """The monitored value to beat: the best checkpoint's, one under way included."""
        if self._lowest is None:
            self._lowest = self.best()[1]
        return self._lowest

    def save(self, step: int, state: Any, config: Config, metrics: dict[str, float] | None) -> None:
        """Begins to write a checkpoint of numpy arrays; the disk is waited for at the next save, or
        by `wait`. A step that has one already is left as it is.

        Where it cannot be written, that is said then; complete checkpoints stay, and the next save
        is tried like any other and removes what is left of this one.
        """
        self.wait()
        if step in self.steps():
            return
        arrays = named_arrays(state)
        about: dict[str, Any] = {
            "format": FORMAT,
            "hashes": {"/".join(path): digest(array) for path, array in arrays.items()},
            "config": to_dict(config),
            "metrics": metrics,
            "dataset": self._dataset,
        }
        if self._imported:
            about["weights_only"] = True
        about["hash"] = text_hash(about)
        items = ocp.args.Composite(
            state=arrays_to_save(traverse_util.unflatten_dict(arrays), sparing=self._imported),
            about=ocp.args.JsonSave(about),
        )
        if metrics is not None:
            self._lowest = min(self.lowest, self.judged(metrics))
        self._under_way = step

        def begin() -> None:
            if not self._open().save(step, args=items, metrics=metrics):
                raise RuntimeError("Orbax counts on another of this step or a later one")

        self._attempt(begin)

    def wait(self) -> None:
        """Until the checkpoint under way is on disk, or was said not to be."""
        if self._manager is not None:
            self._attempt(self._manager.wait_until_finished)

    def require(self, step: int) -> None:
        """Waits for the checkpoint of a step. RunFailed where the disk did not take it."""
        self.wait()
        steps = self.steps()
        if step not in steps:
            before = f"the last that was is of step {steps[-1]}" if steps else "none was before"
            raise RunFailed(
                f"the checkpoint of step {step} could not be written to {self.path} "
                f"({self._trouble}), {before}; make room, or mend what it names, and the same "
                "command goes on from there."
            )

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
            return
        except (OSError, ValueError, RuntimeError) as error:  # a full disk alone raises all of them
            self._trouble = describe_failure(error)
        # The manager counts on the checkpoint that failed. A new one deletes what is left of it.
        manager, self._manager, self._lowest = self._manager, None, None
        if manager is not None:
            with contextlib.suppress(Exception):  # it raises again what was said
                manager.close()
        if self._under_way not in self.steps():  # else an older one could not be removed
            self.say(
                f"The checkpoint of step {self._under_way} could not be written to {self.path} "
                f"({self._trouble}); the run goes on, and the next one is tried."
            )

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself. ValueError where that is damaged, and UserError where
        it is whole but of a newer version of this program: its hash is made in the same way in
        every format."""
        folder = self.path / str(step)
        if not self._ended(step):
            raise ValueError("it is not whole")
        try:
            reader = ocp.Checkpointer(json_handler(), multiprocessing_options=ALONE)
            about = reader.restore(folder / "about")
            claimed = about.pop("hash")
            if about["metrics"] is not None:  # Orbax keeps them a second time, for its own policy
                kept = json.loads((folder / "metrics" / "metrics").read_text(encoding="utf-8"))
                if kept != about["metrics"]:
                    raise ValueError("its metrics were changed")
        except Exception as error:
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if text_hash(about) != claimed:
            raise ValueError("what it says of itself is not what was saved")
        format_of(about, folder)
        return about

    def read(self, step: int) -> Checkpoint:
        """A whole checkpoint.

        Raises ValueError, with what is wrong, where the checkpoint is damaged, and UserError where
        it is whole but of another version of this program.
        """
        folder = self.path / str(step)
        about = self._about(step)
        hashes = about["hashes"]
        try:
            reading = ocp.Checkpointer(arrays_handler(), multiprocessing_options=ALONE)
            with reading as reader:
                metadata = reader.metadata(folder / "state").item_metadata.tree
                # numpy, wherever the arrays were when they were saved
                target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), metadata)
                tree = reader.restore(folder / "state", args=ocp.args.StandardRestore(target))
            arrays = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(tree).items()}
        except Exception as error:  # damage raises many kinds, none documented
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if {"/".join(path) for path in arrays} != set(hashes):
            raise ValueError("it does not hold the arrays it promises")
        for path, array in arrays.items():
            if digest(array) != hashes["/".join(path)]:
                raise ValueError(f"the array {'.'.join(path)} is not what was saved")
        config = self._config(about, step)
        arrays = migrated(arrays, format_of(about, folder), ARRAYS)
        weights_only, written = about.get("weights_only", False), format_of(about, folder)
        return Checkpoint(arrays, config, about.get("dataset"), weights_only, written)

    def chosen(self) -> tuple[Checkpoint, int]:
        """The best checkpoint (the newest where none was validated), or where it is damaged, which
        is said, the next that can be read; and its step.

        Raises UserError where there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self.path.parent.parent} holds no {self.path.name} checkpoint; train one with "
                f"train_{self.path.name}.py."
            )
        best = self.best()[0]
        tried = list(dict.fromkeys([*([] if best is None else [best]), *reversed(steps)]))
        for step in tried:
            try:
                return self.read(step), step
            except ValueError as error:
                self.say(f"The checkpoint {self.path / str(step)} is damaged: {error}.")
        raise UserError(f"every checkpoint in {self.path} is damaged; bring one back from a copy.")

    def restore(
        self,
        template: Any,
        config: Config,
        sections: tuple[str, ...],
        learned: tuple[str, ...],
        say: Callable[[str], None],
    ) -> Any | None:
        """The newest undamaged checkpoint as a state like `template`, or None where there is none
        at all; of imported weights those of the networks that are `learned`. Damaged ones are
        named, and moved aside so that their steps can be saved again.

        Raises UserError where the checkpoints are of a run that trains something else, or where
        none of them can be read.
        """
        damaged = []
        for step in reversed(self._folders()):
            try:
                checkpoint = self.read(step)
            except ValueError as error:
                damaged.append(step)
                say(f"The checkpoint {self.path / str(step)} is damaged: {error}.")
                continue
            self._check_same(checkpoint, config, sections)
            damaged += [older for older in self._folders() if older < step and self._harmed(older)]
            self._set_aside(damaged, say)
            if damaged and damaged[0] > step:
                say(f"The one before it, of step {step}, is used.")
            if checkpoint.weights_only:
                run = self.path.parent.parent
                begun = begun_whole(learned, template, checkpoint.arrays, run)
                say(said(begun, run))
                return begun.state
            return fill(template, checkpoint.arrays)
        if damaged:
            raise UserError(
                f"every checkpoint in {self.path} is damaged; bring one back from a copy, or begin "
                "anew with --restart."
            )
        return None

    def _harmed(self, step: int) -> bool:
        """Whether Orbax would stumble over an older checkpoint, whose arrays nobody asked for."""
        try:
            self._about(step)
        except ValueError:
            return True
        return False

    def _check_same(
        self, checkpoint: Checkpoint, config: Config, sections: tuple[str, ...]
    ) -> None:
        different = differences(config, checkpoint.config, sections)
        if different:
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(different)}. "
                f"{keep_settings(self.path.parent.parent)} Otherwise choose another --workdir, or "
                "begin anew with --restart."
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

    def _set_aside(self, steps: list[int], say: Callable[[str], None]) -> None:
        for place in self._move(steps, "damaged"):
            say(f"The damaged one was moved to {place}.")

    def _move(self, steps: list[int], why: str) -> list[Path]:
        """Moves checkpoints out of Orbax's sight; returns where they are now."""
        self.close()
        moved = []
        for step in steps:
            place = self.path.with_name(f"{self.path.name}-{why}") / str(step)
            while place.exists():
                place = place.with_name(place.name + "-again")
            place.parent.mkdir(exist_ok=True)
            (self.path / str(step)).rename(place)
            moved.append(place)
        return moved

    def clear(self, config: Config, sections: tuple[str, ...]) -> None:
        """Deletes this stage's checkpoints, for a run that begins anew, and nothing else. One of
        imported weights stays, as what the run begins from, or is moved aside where its settings
        are others; so is what is not whole, by which Orbax would count as well."""
        self.close()
        for step in self.steps():
            try:
                about = self._about(step)
            except ValueError:
                about = {}
            if not about.get("weights_only"):
                shutil.rmtree(self.path / str(step))
            elif differences(
                config, settings(about["config"], format_of(about, self.path)), sections
            ):
                self._move([step], "imported")
        self._set_aside([step for step in self._folders() if not self._ended(step)], self.say)
