"""Checks that the checkpoints of a run are what its settings and data produce, by taking some of
its steps again."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.config.load import diff_configs, override, read_config, update_data_settings
from taming_jax.config.schema import Config
from taming_jax.data.fingerprints import diff_fingerprints
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.parallel.devices import Devices, copy_buffers
from taming_jax.parallel.runtime import prepare
from taming_jax.progress import Progress
from taming_jax.storage import folder_lock, read_arrays
from taming_jax.training import get_stages
from taming_jax.training.checkpoints import Checkpoint, Store
from taming_jax.training.stage import Stage, report_failures
from taming_jax.training.state import TrainState
from taming_jax.weights.arrays import digest, fill, flatten_arrays


def verify_run(folder: Path, data: Mapping[str, Any] | None = None) -> None:
    """Verifies each stage of a run, and says what it found. `data` overrides data settings, as in
    `load_run`.

    Raises RunFailed at the first thing that is not what it should be, and UserError if the folder
    holds no run.
    """
    stores = [store for name in get_stages() if (store := Store(folder, name)).steps()]
    if not stores:
        raise UserError(f"{folder} holds no checkpoints; name the folder of a run.")
    with folder_lock(folder, "verifying"):
        config = read_current_config(folder)
        prepare(config)  # before reading checkpoints starts JAX
        last = {}  # of each stage, up to two
        for store in stores:
            name, steps = store.path.name, store.steps()
            last[name] = [read_checkpoint(store, step) for step in steps][-2:]
            say(f"{name}: the hashes of the checkpoints at {format_steps(steps)} match.")
        check_settings(config, {name: checkpoints[-1] for name, checkpoints in last.items()})
        check_tokens(folder / "tokens")
        for store in stores:
            name, best = store.path.name, store.best()[0]
            verify_stage(folder, name, last[name], data or {})
            if best not in (None, last[name][-1].step):
                say(
                    f"{name}: sampling uses the best checkpoint, that of step {best}, whose steps "
                    "were not repeated."
                )


def read_current_config(folder: Path) -> Config:
    """Returns a run's config.json. Raises RunFailed if it cannot be read."""
    try:
        return read_config(folder / "config.json")
    except UserError as error:
        raise RunFailed(str(error)) from error


def format_steps(steps: list[int]) -> str:
    *others, last = map(str, steps)
    return f"steps {', '.join(others)} and {last}" if others else f"step {last}"


def format_range(start: int, end: int) -> str:
    one = end == start + 1
    return f"step {end} was" if one else f"steps {start + 1} to {end} were"


def read_checkpoint(store: Store, step: int) -> Checkpoint:
    """Reads a checkpoint. Raises RunFailed if it or a network that it refers to is damaged."""
    try:
        return store.read(step)
    except ValueError as error:
        raise RunFailed(f"the checkpoint {store.path / str(step)} is damaged: {error}.") from error
    except UserError as error:
        raise RunFailed(str(error)) from error


def check_tokens(folder: Path) -> None:
    """Raises RunFailed if a file of encoded images is damaged."""
    for file in sorted(folder.rglob("*.npz")):
        if read_arrays(file) is None:
            raise RunFailed(f"{file} is damaged. Delete it, and training encodes the images again.")


def check_settings(current: Config, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raises RunFailed if a run's config.json describes another run than the last checkpoints of
    its stages, which may have different seeds."""
    changes: list[str] = []
    for name, checkpoint in checkpoints.items():
        changes += diff_configs(current, checkpoint.config, ("data", name))
    seeds = [checkpoint.config.seed for checkpoint in checkpoints.values()]
    if current.seed not in seeds:
        changes.append(f"--seed is {current.seed}, not {seeds[-1]}")
    if changes:
        raise RunFailed(
            f"config.json differs from the checkpoints: {'; '.join(dict.fromkeys(changes))}."
        )


def verify_stage(
    folder: Path, name: str, checkpoints: list[Checkpoint], data: Mapping[str, Any]
) -> None:
    """Repeats the steps before the last of a stage's checkpoints, or only the first of them if this
    machine may round differently."""
    last, start = checkpoints[-1], checkpoints[-2] if len(checkpoints) > 1 else None
    begins_elsewhere = getattr(last.config, name).init_from is not None
    if last.weights_only or (start.weights_only if start else begins_elsewhere):
        say(f"{name}: no steps can be repeated, since the run began with other weights.")
        return
    count = (last.environment or {}).get("devices", 1)
    devices = Devices(count if count <= jax.device_count() else 1)
    first = 0 if start is None else start.step
    try:
        config = update_data_settings(last.config, folder)
        config = override(config, {f"data.{key}": value for key, value in data.items()})
        stage = get_stages()[name](dataclasses.replace(config, workdir=str(folder)), devices)
        check_data(stage, last)
        state = stage.init(jax.random.key(config.seed))
        state = state if start is None else fill(state, start.arrays)
    except UserError as error:  # such as other data, or data that cannot be read
        raise RunFailed(str(error)) from error
    state = copy_buffers(devices.replicate(state))
    differences = describe_differences(stage, last)
    with report_failures(folder, stage):
        if not differences:
            state, _ = replay(stage, state, first, last.step)
            compare_arrays(stage, devices.fetch(state), last)
            source = "tokens" if name == "prior" else "data"
            say(
                f"{name}: {format_range(first, last.step)} repeated, and every array is that of "
                f"the last checkpoint, bit for bit: it is what these settings and {source} produce."
            )
        elif last.first_step is None or last.first_step["step"] != first + 1:
            reason = f"the metrics of step {first + 1} were not saved"
            say(f"{name}: no step can be compared, since {reason}, and {differences}.")
        else:
            compare_metrics(stage, replay(stage, state, first, first + 1)[1], last.first_step)
            say(
                f"{name}: step {first + 1} was repeated, and its metrics agree with those of the "
                "run up to rounding. The last checkpoint was not compared bit for bit, since "
                f"{differences}."
            )


def check_data(stage: Stage, checkpoint: Checkpoint) -> None:
    """Raises RunFailed if the images or labels are not those that a run was trained on."""
    now, then = stage.dataset, checkpoint.dataset or {}
    if changes := diff_fingerprints(now, then):
        raise RunFailed(f"the run was trained on other data: {'; '.join(changes)}.")
    expected = then.get("hashes") or {}
    for name, value in now["hashes"].items():
        if expected.get(name) is None:
            say(f"{stage.name}: the run has no hash of the {name} images, so they are not checked.")
        elif value != expected[name]:
            raise RunFailed(
                f"at least one of the {name} images or labels is not what the run was trained on. "
                "If nobody changed them, another version of a decoder may round differently."
            )


def describe_differences(stage: Stage, checkpoint: Checkpoint) -> str:
    """Returns clauses that say why steps on these devices may round differently than in a run, or
    an empty string if they do not."""
    then, now = checkpoint.environment, stage.devices.describe()
    if then is None:
        return "it is not known where the run was trained"
    names = {
        "devices": "the number of devices", "device_kind": "the device", "cpu": "the CPU",
        "runtime": "the runtime of the devices", "processes": "the number of processes",
        "cores": "the number of cores",
    }  # fmt: skip
    clauses = [
        f"{phrase} differs"
        + (f" ({now[name]}, not {then[name]})" if name != "cpu" and name in then else "")
        for name, phrase in names.items()
        if name in now and now[name] != then.get(name)
    ] + [
        f"the run used {name} {then['versions'].get(name)}, not {version}"
        for name, version in now["versions"].items()
        if then["versions"].get(name) != version
    ]
    if stage.devices.list[0].platform != "cpu":
        if not stage.config.deterministic:
            clauses.append("the run was not deterministic")
        if stage.steps_per_dispatch > 1:
            clauses.append("the run took several steps per dispatch")
    return ", and ".join(clauses)


def replay(
    stage: Stage, state: TrainState, start: int, end: int
) -> tuple[TrainState, dict[str, Any]]:
    """Takes the steps of a stage from `start` to `end`. Returns the state, and the metrics of the
    last step."""
    with contextlib.ExitStack() as stack:
        feed, validation = stage.build_feeds()
        for opened in (feed, validation):
            stack.callback(opened.close)
        progress = stack.enter_context(Progress(f"repeating {stage.name}", end - start, "steps"))
        for step in range(start, end):
            state, device_metrics = stage.train_step(state, feed.batch(step))
            metrics = stage.devices.fetch(device_metrics)  # waits for the device
            progress.update(1)
    return state, metrics.unpack()[0]


def compare_arrays(stage: Stage, state: TrainState, checkpoint: Checkpoint) -> None:
    """Raises RunFailed if the arrays of a state are not those of a checkpoint, bit for bit."""
    frozen = {("nets", name) for name in stage.frozen}
    expected = {path: x for path, x in checkpoint.arrays.items() if path[:2] not in frozen}
    failed = (
        f"{stage.name}: the settings and data do not produce the checkpoint of step "
        f"{checkpoint.step}"
    )
    actual = {path: np.asarray(x) for path, x in flatten_arrays(state).items()}
    if others := sorted(actual.keys() ^ expected.keys()):
        owner = "the checkpoint has" if others[0] in expected else "the settings give"
        raise RunFailed(f"{failed}: only {owner} the array {'.'.join(others[0])}.")
    for path, array in actual.items():
        if digest(array) != digest(expected[path]):
            difference = np.abs(np.subtract(array, expected[path], dtype=np.float64)).max()
            raise RunFailed(
                f"{failed}: the array {'.'.join(path)} differs by up to {difference:.2g}."
            )


def compare_metrics(stage: Stage, metrics: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises RunFailed if the metrics of a step differ from those that the run saved by more than
    rounding can explain."""
    is_exact = stage.config.dtype == "float32" and stage.devices.list[0].platform == "cpu"
    tolerance = 1e-3 if is_exact else 3e-2
    for name in saved:
        if name == "step":
            continue
        value, expected = metrics.get(name, np.nan), saved[name]
        if not abs(value - expected) <= max(tolerance * abs(expected), 0.1 * tolerance):
            raise RunFailed(
                f"{stage.name}: the settings and data do not produce step {saved['step']}: {name} "
                f"is {value:.6g}, not {expected:.6g}."
            )
