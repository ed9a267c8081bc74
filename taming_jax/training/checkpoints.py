"""Checkpoints of both stages, written by Orbax.

The checkpoints of a stage are in `checkpoints/NAME/STEP`. Each is one atomic commit of two items:
`state` holds the arrays by name, and `about` holds the metadata, which are the format number, the
hash of each array, the config, the metrics, the fingerprint of the dataset, and the environment. A
commit is either complete or absent, but Orbax does not detect corrupted bytes when it restores
arrays, so `read` compares the hashes.

Networks that the stage uses but does not train are stored once (see frozen.py); the metadata hold
their hashes.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from taming_jax.config.load import advise_on_settings, diff_configs, parse_settings
from taming_jax.config.migrations import (
    ARRAY_MIGRATIONS,
    FORMAT,
    MICRO_BATCH_FORMAT,
    SCORE_FORMAT,
    migrate,
    read_format,
)
from taming_jax.config.schema import Config
from taming_jax.config.serialization import to_dict
from taming_jax.data.fingerprints import diff_fingerprints
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.storage import hash_json
from taming_jax.training.frozen import FrozenNetworks
from taming_jax.training.orbax_io import describe_failure, read_state, write_checkpoint
from taming_jax.training.weights import Name, describe_loaded, load_matching_weights
from taming_jax.weights.arrays import digest, fill, flatten_arrays

FD = "fd_vgg16"  # a Fréchet distance, which takes precedence over `best_metric`


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    `arrays` are named by their paths and include those of frozen networks. `config` is that of the
    run. `dataset` is the fingerprint of the training data (fingerprints.py), or None if that is
    not known. `weights_only` is true if there are no optimizer states. `format` is the format
    number (config/migrations.py). `environment` describes the devices, and `first_step` holds the
    number and the metrics of the first step after the previous checkpoint; they are None in
    checkpoints of older versions and of imported weights.
    """

    step: int
    arrays: dict[Name, np.ndarray]
    config: Config
    dataset: dict[str, Any] | None
    weights_only: bool
    format: int
    environment: dict[str, Any] | None
    first_step: dict[str, float] | None

    @property
    def nets(self) -> dict[str, Any]:
        """The arrays of each network as nested dictionaries."""
        return traverse_util.unflatten_dict(self.arrays)["nets"]

    @property
    def generator(self) -> Any:
        """The generator's parameters for evaluation: the EMA if there is one."""
        net = self.nets["generator"]
        return net.get("ema", net["params"])


class Store:
    """The checkpoints of one stage in a run's folder: the last two and the best. The best one has
    the lowest Fréchet distance if the run measures it, else the lowest `best_metric`.

    `dataset` is the fingerprint (fingerprints.py) of the training data. Each checkpoint stores it,
    and a resumed run must have the same one. `frozen` holds the parameters of networks that are not
    trained, by the networks' names. Checkpoints also store the `environment`, a description of the
    devices. `say` is called with a sentence if a checkpoint is damaged or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        best_metric: str = "nll",
        dataset: dict[str, Any] | None = None,
        frozen: Mapping[str, Any] | None = None,
        environment: dict[str, Any] | None = None,
    ):
        self.folder, self.path = folder, folder.absolute() / "checkpoints" / name
        self._best_metric, self._dataset, self._environment = best_metric, dataset, environment
        self._frozen = FrozenNetworks(self.path / "frozen", frozen or {})
        self._executor = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: tuple[int, concurrent.futures.Future[None]] | None = None
        self._failure = ""
        self.say: Callable[[str], None] = say

    def score(self, metrics: dict[str, float]) -> float:
        """Returns the validation metric that ranks checkpoints; lower is better."""
        return float(metrics.get(FD, metrics[self._best_metric]))

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in ascending order."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if p.name.isdigit())

    def read_last_config(self) -> Config | None:
        """Returns the config of the newest undamaged checkpoint with optimizer states, or None."""
        for step in reversed(self.steps()):
            with contextlib.suppress(ValueError):
                metadata = self._read_metadata(step)
                if not metadata.get("weights_only"):
                    return self._read_config(metadata, step)
        return None

    def best(self) -> tuple[int | None, float]:
        """Returns the step of the best checkpoint and its score, or None and infinity if no
        checkpoint has a score."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(ValueError):
                if (score := self._read_metadata(step)["score"]) is not None:
                    scores[step] = score
        best = min(scores, key=lambda step: scores[step], default=None)
        return (None, math.inf) if best is None else (best, scores[best])

    def save(
        self,
        step: int,
        state: Any,
        config: Config,
        metrics: dict[str, float] | None,
        weights_only: bool = False,
        first_step: dict[str, float] | None = None,
    ) -> None:
        """Starts writing a checkpoint in a thread. `wait` and the next save wait for it.

        Does nothing if the step has a checkpoint already. `state` holds arrays of numpy or JAX,
        which must not change until the checkpoint is written. `weights_only` marks a checkpoint
        without optimizer states; for `first_step` see `Checkpoint`. If the checkpoint cannot be
        written, `say` reports it, and earlier checkpoints stay.
        """
        self.wait()
        if step in self.steps():
            return
        metadata: dict[str, Any] = {
            "format": FORMAT,
            "config": to_dict(config),
            "metrics": metrics,
            "score": None if metrics is None else self.score(metrics),
            "dataset": self._dataset,
            "frozen": self._frozen.hashes,
            "environment": self._environment,
            "first_step": first_step,
        }
        if weights_only:
            metadata["weights_only"] = True
        leaves = flatten_arrays(state)
        self._writing = step, self._executor.submit(self._write, step, leaves, metadata)

    def _write(self, step: int, leaves: dict[Name, Any], metadata: dict[str, Any]) -> None:
        """Writes a checkpoint, and deletes all others except the last two and the best. For a large
        model, this takes a second or more, during which training continues. Empties `leaves`, so
        that each array leaves the memory of the device as soon as it is fetched."""
        arrays = {path: np.asarray(leaves.pop(path)) for path in list(leaves)}
        metadata["hashes"] = {"/".join(path): digest(array) for path, array in arrays.items()}
        metadata["hash"] = hash_json(metadata)
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        self._frozen.write()
        write_checkpoint(self.path / str(step), arrays, metadata)
        for old in set(self.steps()[:-2]) - {self.best()[0]}:
            shutil.rmtree(self.path / str(old))

    def wait(self) -> None:
        """Waits until the pending checkpoint is on disk, or reports that it could not be
        written."""
        if self._writing is None:
            return
        (step, written), self._writing = self._writing, None
        try:
            written.result()
        except jax.errors.JaxRuntimeError:  # the device failed, not the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:  # a full disk can raise any of these
            self._report_failure(step, error)

    def _remove_partial(self) -> None:
        """Deletes the incomplete checkpoints that failed or interrupted saves leave behind."""
        for partial in self.path.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failure = describe_failure(error)
        self._remove_partial()
        if step not in self.steps():  # otherwise, only the deletion of an old checkpoint failed
            self.say(
                f"The checkpoint of step {step} could not be written to {self.path} "
                f"({self._failure}); the run continues and tries to write the next one."
            )

    def require(self, step: int) -> None:
        """Waits for the checkpoint of a step. Raises RunFailed if it could not be written."""
        self.wait()
        steps = self.steps()
        if step not in steps:
            before = (
                f"the last one is from step {steps[-1]}" if steps else "there is no earlier one"
            )
            raise RunFailed(
                f"the checkpoint of step {step} could not be written to {self.path} "
                f"({self._failure}); {before}. Free disk space or fix the cause, then resume with "
                "the same command (without --restart)."
            )

    def _read_metadata(self, step: int) -> dict[str, Any]:
        """Reads the metadata of a checkpoint. Raises ValueError if it is damaged, and UserError
        if it is intact but in a newer format. All formats hash the metadata in the same way."""
        folder = self.path / str(step)
        if not (folder / "_CHECKPOINT_METADATA").exists():
            raise ValueError("it is incomplete")
        try:
            metadata = json.loads((folder / "about" / "metadata").read_text(encoding="utf-8"))
            expected = metadata.pop("hash")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if hash_json(metadata) != expected:
            raise ValueError("its metadata differs from what was saved")
        if read_format(metadata, folder) < SCORE_FORMAT:
            metrics = metadata["metrics"]
            metadata["score"] = metrics and metrics.get(FD, metrics.get("nll"))
        return metadata

    def _read_config(self, metadata: dict[str, Any], step: int) -> Config:
        """Returns the config of a checkpoint. Raises UserError if it has settings that this version
        does not know."""
        folder = self.path / str(step)
        try:
            return parse_settings(metadata["config"], read_format(metadata, folder))
        except UserError as error:
            raise UserError(
                f"{folder} was written by another version of this program: {error}"
            ) from error

    def read(self, step: int) -> Checkpoint:
        """Reads the checkpoint of a step.

        Raises ValueError with a description of the problem if the checkpoint is damaged, and
        UserError if it is intact but was written by another version of this program, or if a frozen
        network that it refers to is missing or damaged.
        """
        folder = self.path / str(step)
        metadata = self._read_metadata(step)
        try:
            arrays = read_state(folder)
        except Exception as error:  # Orbax does not document which exceptions damage raises
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if {"/".join(path) for path in arrays} != set(metadata["hashes"]):
            raise ValueError("it does not hold the arrays that were saved")
        for path, array in arrays.items():
            if digest(array) != metadata["hashes"]["/".join(path)]:
                raise ValueError(f"the array {'.'.join(path)} differs from what was saved")
        format_number = read_format(metadata, folder)
        arrays = migrate(arrays, format_number, ARRAY_MIGRATIONS)
        arrays |= self._frozen.read(metadata.get("frozen", {}))
        return Checkpoint(
            step, arrays,
            self._read_config(metadata, step), metadata.get("dataset"),
            metadata.get("weights_only", False), format_number, metadata.get("environment"),
            metadata.get("first_step"),
        )  # fmt: skip

    def read_undamaged(self, steps: Iterable[int]) -> Iterator[Checkpoint]:
        """Yields the undamaged checkpoints of the given steps, and reports damaged ones. Raises
        UserError in the same cases as `read`."""
        for step in steps:
            try:
                yield self.read(step)
            except ValueError as error:
                self.say(f"The checkpoint {self.path / str(step)} is damaged: {error}.")

    def _read_first_undamaged(self, steps: Iterable[int], advice: str = "") -> Checkpoint:
        """Returns the first undamaged checkpoint of the given steps. Raises UserError if all are
        damaged; `advice` completes the message."""
        for checkpoint in self.read_undamaged(steps):
            return checkpoint
        raise UserError(
            f"every checkpoint in {self.path} is damaged; restore one from a backup{advice}."
        )

    def load_best(self) -> Checkpoint:
        """Returns the best checkpoint, or the newest undamaged one if the best one is damaged or no
        checkpoint has a score. Raises UserError if there is none."""
        steps, best = self.steps(), self.best()[0]
        if not steps:
            raise UserError(
                f"{self.folder} holds no {self.path.name} checkpoint; train this stage with "
                f"train_{self.path.name}.py."
            )
        order = dict.fromkeys([*([] if best is None else [best]), *reversed(steps)])
        return self._read_first_undamaged(order)

    def restore(
        self, template: Any, config: Config, sections: tuple[str, ...], learned: tuple[str, ...]
    ) -> Any | None:
        """Returns the newest undamaged checkpoint as a state with the structure of `template`, or
        None if there is no checkpoint. If the checkpoint holds weights only, restores only the
        `learned` networks.

        Damaged checkpoints are reported, and moved aside so that their steps can be saved again.

        Raises UserError if the checkpoints belong to a run with other settings or data, or if none
        of them can be read.
        """
        steps = self.steps()
        if not steps:
            return None
        checkpoint = self._read_first_undamaged(reversed(steps), ", or start over with --restart")
        self._check_compatible(checkpoint, config, sections)
        for damaged in steps[steps.index(checkpoint.step) + 1 :]:
            new_path = self._move_aside(damaged, "damaged")
            self.say(f"The damaged checkpoint was moved to {new_path}.")
        if checkpoint.step != steps[-1]:
            self.say(f"Using the checkpoint of step {checkpoint.step} instead.")
        if not checkpoint.weights_only:
            return fill(template, checkpoint.arrays)
        loaded = load_matching_weights(learned, template, checkpoint.arrays)
        self.say(describe_loaded(loaded, self.folder))
        return loaded.state

    def _check_compatible(
        self, checkpoint: Checkpoint, config: Config, sections: tuple[str, ...]
    ) -> None:
        """Raises UserError if the checkpoint belongs to a run with other settings or data."""
        created = checkpoint.config
        if created.dtype == "auto":  # an imported run, which has not been trained here yet
            created = dataclasses.replace(created, dtype=config.dtype)
        differences = diff_configs(config, created, sections)
        if differences:
            raise UserError(
                f"your settings differ from those of the run in {self.path}: "
                f"{'; '.join(differences)}. "
                f"{advise_on_settings(self.folder)} Otherwise choose another --workdir, or start "
                "over with --restart."
            )
        count = checkpoint.config.vqgan.micro_batches
        if self.path.name == "vqgan" and count > 1 and checkpoint.format < MICRO_BATCH_FORMAT:
            raise UserError(
                f"{self.path} holds a run with --vqgan.micro-batches {count} of an older version, "
                "which computed one adaptive weight per batch; this version computes one per "
                "micro-batch. Choose another --workdir, or start over with --restart."
            )
        data_changes = diff_fingerprints(self._dataset, checkpoint.dataset)
        if data_changes:
            raise UserError(
                f"{self.path} holds a run trained on other data: {'; '.join(data_changes)}. Set "
                "--data.path to the same data, choose another --workdir, or start over with "
                "--restart."
            )

    def _move_aside(self, step: int, reason: str) -> Path:
        """Moves a checkpoint to a folder named after the reason, and returns its new path."""
        path = self.path.with_name(f"{self.path.name}-{reason}") / str(step)
        while path.exists():
            path = path.with_name(path.name + "-again")
        path.parent.mkdir(exist_ok=True)
        return (self.path / str(step)).rename(path)

    def clear(self, config: Config, sections: tuple[str, ...]) -> None:
        """Deletes this stage's checkpoints, and nothing else, for a run that starts over.

        A checkpoint with weights only stays, since the run starts from it, unless its settings
        differ: then it is moved aside, like damaged and incomplete checkpoints. Frozen networks to
        which only deleted checkpoints refer are deleted.
        """
        unused: set[str] = set()
        used: set[str] = set()
        for step in self.steps():
            try:
                metadata = self._read_metadata(step)
            except ValueError:
                self._move_aside(step, "damaged")
                continue
            weights_only = metadata.get("weights_only")
            (used if weights_only else unused).update(metadata.get("frozen", {}).values())
            if not weights_only:
                shutil.rmtree(self.path / str(step))
            elif diff_configs(config, self._read_config(metadata, step), sections):
                self._move_aside(step, "weights-only")
        self._frozen.delete(unused - used)
