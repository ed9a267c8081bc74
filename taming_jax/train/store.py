"""The Orbax store that generator, discriminator and transformer share.

A stage's checkpoints lie in `checkpoints/NAME/STEP`, each one commit of two items: `state`, the
arrays by their names, and `about`, the hash of each array and the config. Orbax makes a commit
whole or not at all, but restores a flipped byte without a word: hence the hashes.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy

from taming_jax.config import Config, differences, from_dict, to_dict
from taming_jax.errors import RunFailed, UserError

logging.getLogger("absl").setLevel(logging.ERROR)


def named_arrays(tree: Any) -> dict[tuple[str, ...], Any]:
    """A pytree's leaves by the names on the way to them."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        raise TypeError(f"a pytree key of kind {type(key)}")

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(map(name, path)): leaf for path, leaf in leaves}


def digest(array: np.ndarray) -> str:
    """A hash of an array's type, shape and bytes."""
    kind = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(kind + np.ascontiguousarray(array).tobytes()).hexdigest()


class Store:
    """The checkpoints of one stage in a run's folder: the last two, and the best by `monitor`
    (lower is better)."""

    def __init__(self, folder: Path, name: str, monitor: str, read_only: bool = False):
        self._read_only = read_only
        self.path = folder.absolute() / "checkpoints" / name
        self._monitor = monitor
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:

            def metric(metrics: Any) -> float:
                return metrics[self._monitor]

            keep = preservation_policy.AnyPreservationPolicy([
                preservation_policy.LatestN(2),
                preservation_policy.BestN(
                    get_metric_fn=metric, reverse=True, n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ])  # fmt: skip
            self._manager = ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep, best_fn=metric, best_mode="min",
                    cleanup_tmp_directories=not self._read_only, read_only=self._read_only,
                    enable_async_checkpointing=True,
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()
                },
            )  # fmt: skip
        return self._manager

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if p.name.isdigit() and p.is_dir())

    def best(self) -> tuple[int | None, float]:
        """The step of the best checkpoint and its monitored value; None and infinity where no
        checkpoint was validated."""
        step = self._open().best_step() if self.steps() else None
        metrics = self._open().metrics(step) if step is not None else None
        return (step, metrics[self._monitor]) if metrics else (None, float("inf"))

    def save(self, step: int, state: Any, config: Config, metrics: dict[str, float] | None) -> None:
        """Begins to write a checkpoint of numpy arrays; the disk is waited for at the next save, or
        by `wait`. A step that has one already is left as it is."""
        if step in self.steps():
            return
        arrays = named_arrays(state)
        about = {
            "hashes": {"/".join(path): digest(array) for path, array in arrays.items()},
            "config": to_dict(config),
        }
        self._guarded(lambda: self._open().save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(traverse_util.unflatten_dict(arrays)),
                about=ocp.args.JsonSave(about),
            ),
            metrics=metrics,
        ))  # fmt: skip

    def wait(self) -> None:
        """Until the checkpoint under way is on disk."""
        if self._manager is not None:
            self._guarded(self._manager.wait_until_finished)

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise RunFailed(f"no checkpoint could be written to {self.path}: {error}.") from error

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def read(self, step: int) -> tuple[dict[tuple[str, ...], np.ndarray], Config]:
        """A checkpoint's arrays by name and the config it was trained with.

        Raises ValueError, with what is wrong, where the checkpoint is damaged.
        """
        folder = self.path / str(step)
        try:
            about = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "about")
            hashes, config = about["hashes"], about["config"]
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                metadata = reader.metadata(folder / "state").item_metadata.tree
                # numpy, wherever the arrays were when they were saved
                target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), metadata)
                tree = reader.restore(folder / "state", args=ocp.args.StandardRestore(target))
            arrays = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(tree).items()}
        except Exception as error:
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if {"/".join(path) for path in arrays} != set(hashes):
            raise ValueError("it does not hold the arrays it promises")
        for path, array in arrays.items():
            if digest(array) != hashes["/".join(path)]:
                raise ValueError(f"the array {'.'.join(path)} is not what was saved")
        return arrays, from_dict(Config, config)

    def chosen(self) -> tuple[dict[tuple[str, ...], np.ndarray], Config, int]:
        """The best checkpoint that can be read (the newest where none was validated): its arrays,
        its config and its step.

        Raises UserError where there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self.path.parent.parent} holds no {self.path.name} checkpoint; train one with "
                f"train_{self.path.name}.py."
            )
        best = self.best()[0]
        self.close()
        problems = []
        for step in [*([best] if best is not None else []), *reversed(steps)]:
            try:
                return *self.read(step), step
            except ValueError as error:
                problems.append(f"{self.path / str(step)}: {error}")
        raise UserError(f"no checkpoint in {self.path} can be used ({'; '.join(problems)}).")

    def restore(
        self,
        template: Any,
        config: Config,
        sections: tuple[str, ...],
        say: Callable[[str], None],
    ) -> Any | None:
        """The newest undamaged checkpoint as a state like `template`, or None where there is none
        at all. Damaged ones are named, and moved aside so that their steps can be saved again.

        Raises UserError where the checkpoints are of a run that trains something else, or where
        none of them can be read.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                arrays, trained = self.read(step)
            except ValueError as error:
                damaged.append(step)
                say(f"The checkpoint {self.path / str(step)} is damaged: {error}.")
                continue
            self._check_same(trained, config, sections)
            self._set_aside(damaged, say)
            if damaged:
                say(f"The one before it, of step {step}, is used.")
            return fill(template, arrays)
        if damaged:
            raise UserError(
                f"every checkpoint in {self.path} is damaged; bring one back from a copy, or begin "
                "anew with --restart."
            )
        return None

    def _check_same(self, trained: Config, config: Config, sections: tuple[str, ...]) -> None:
        different = differences(config, trained, sections)
        if different:
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(different)}. Use the "
                "same settings, another --workdir, or --restart to begin anew."
            )

    def _set_aside(self, steps: list[int], say: Callable[[str], None]) -> None:
        self.close()
        for step in steps:
            place = self.path.with_name(f"{self.path.name}-damaged") / str(step)
            while place.exists():
                place = place.with_name(place.name + "-again")
            place.parent.mkdir(exist_ok=True)
            (self.path / str(step)).rename(place)
            say(f"The damaged one was moved to {place}.")

    def clear(self) -> None:
        """Deletes this stage's checkpoints, for a run that begins anew, and nothing else."""
        for step in self.steps():
            self._open().delete(step)
        self.close()


def fill(template: Any, arrays: dict[tuple[str, ...], np.ndarray]) -> Any:
    """A pytree like `template` with arrays by name; shapes are the template's."""
    wanted = named_arrays(template)
    for path, leaf in wanted.items():
        if path not in arrays or arrays[path].shape != leaf.shape:
            found = arrays[path].shape if path in arrays else "missing"
            raise UserError(
                f"the checkpoint's array {'.'.join(path)} is {found}, but the settings make it "
                f"{leaf.shape}; it is of another version of this program."
            )
    leaves = [arrays[path] for path in wanted]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def chosen_generator(folder: Path, anew: bool = False) -> tuple[Any, Config]:
    """The generator whose codes a run's prior speaks, and the config it was trained with: the one
    in the newest checkpoint of the prior, or, before there is one (or where the prior begins
    `anew`), the best of stage 1, its moving average where it keeps one.

    Raises UserError where the folder holds neither.
    """
    prior = Store(folder, "prior", "nll", read_only=True)
    for step in [] if anew else reversed(prior.steps()):
        try:
            arrays, config = prior.read(step)
        except ValueError:
            continue
        return traverse_util.unflatten_dict(arrays)["nets"]["generator"]["params"], config
    vqgan = Store(folder, "vqgan", "nll", read_only=True)
    arrays, config, _ = vqgan.chosen()
    net = traverse_util.unflatten_dict(arrays)["nets"]["generator"]
    return net.get("ema", net["params"]), config
