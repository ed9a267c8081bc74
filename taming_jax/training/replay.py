"""Checks that the checkpoints of a run are what its settings and data produce, by taking some of
its steps again."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.config.load import diff_configs, read_config, update_data_settings
from taming_jax.config.migrations import RENAMED_METRICS, rename_keys
from taming_jax.data.fingerprints import diff_fingerprints
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.parallel.devices import Devices, copy_buffers
from taming_jax.parallel.runtime import prepare
from taming_jax.progress import Progress
from taming_jax.storage import folder_lock, read_arrays
from taming_jax.training import get_stages
from taming_jax.training.checkpoints import Checkpoint, Store
from taming_jax.training.loop import average_metrics
from taming_jax.training.stage import Stage
from taming_jax.training.state import TrainState
from taming_jax.training.writers import read_rows
from taming_jax.weights.arrays import fill, flatten_arrays

MAX_WINDOW = 20  # the most steps of a line of the log to repeat; rounding grows from step to step


def verify_run(folder: Path) -> None:
    """Verifies each stage of a run, and says what it found.

    Raises RunFailed at the first thing that is not what it should be, and UserError if the folder
    holds no run.
    """
    stores = [store for name in get_stages() if (store := Store(folder, name)).steps()]
    if not stores:
        raise UserError(f"{folder} holds no checkpoints; name the folder of a run.")
    with folder_lock(folder, "verifying"):
        last = {}  # of each stage, up to two
        for store in stores:
            name, steps = store.path.name, store.steps()
            last[name] = [read_checkpoint(store, step) for step in steps][-2:]
            say(f"{name}: the hashes of the checkpoints of steps {format_steps(steps)} match.")
            check_settings(folder, name, last[name][-1])
        check_tokens(folder / "tokens")
        for store in stores:
            name, best = store.path.name, store.best()[0]
            verify_stage(folder, name, last[name])
            if best not in (None, last[name][-1].step):
                say(
                    f"{name}: sampling uses the best checkpoint, that of step {best}, whose steps "
                    "were not repeated."
                )


def format_steps(steps: list[int]) -> str:
    return " and ".join(filter(None, [", ".join(map(str, steps[:-1])), str(steps[-1])]))


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


def check_settings(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Raises RunFailed if config.json describes another run than a checkpoint."""
    try:
        current = read_config(folder / "config.json")
    except UserError as error:
        raise RunFailed(str(error)) from error
    if changes := diff_configs(current, checkpoint.config, ("seed", "dtype", "data", name)):
        raise RunFailed(f"config.json differs from the checkpoints: {'; '.join(changes)}.")


def verify_stage(folder: Path, name: str, checkpoints: list[Checkpoint]) -> None:
    """Repeats the steps before the last of a stage's checkpoints, or as many as make sense on this
    machine."""
    last, start = checkpoints[-1], checkpoints[-2] if len(checkpoints) > 1 else None
    begins_elsewhere = getattr(last.config, name).init_from is not None
    if last.weights_only or (start.weights_only if start else begins_elsewhere):
        say(f"{name}: no steps can be repeated, since the run began with other weights.")
        return
    config = update_data_settings(last.config, folder)
    config = dataclasses.replace(config, workdir=str(folder))
    prepare(config)
    count = (last.environment or {}).get("devices", 1)
    devices = Devices(count if count <= jax.device_count() else 1)
    try:
        stage = get_stages()[name](config, devices)
    except UserError as error:  # such as other data, or data that cannot be read
        raise RunFailed(str(error)) from error
    check_data(stage, last)
    state = stage.init(jax.random.key(config.seed))
    if start is not None:
        state = fill(state, start.arrays)
    state = copy_buffers(devices.replicate(state))
    first = 0 if start is None else start.step
    differences = describe_differences(stage, last)
    if not differences:
        state, _ = replay(stage, state, first, last.step)
        compare_arrays(name, devices.fetch(state), last)
        source = "tokens" if name == "prior" else "data"
        say(
            f"{name}: {format_range(first, last.step)} repeated, and every array is that of the "
            f"last checkpoint, bit for bit: it is what these settings and {source} produce."
        )
        return
    rows = read_rows(folder / "metrics" / f"{name}.jsonl")
    row = next((x for x in rows if x["split"] == "train" and x["step"] > first), None)
    if row is None or row["step"] > first + MAX_WINDOW:
        reason = f"the log has no line within {MAX_WINDOW} steps of step {first}"
        say(f"{name}: no steps can be compared, since {reason}, and {differences}.")
        return
    metrics = replay(stage, state, first, row["step"])[1]
    compare_metrics(stage, metrics, rename_keys(row, RENAMED_METRICS[name]))
    say(
        f"{name}: {format_range(first, row['step'])} repeated, and the metrics agree with the log "
        f"up to rounding. The state was not compared bit for bit: {differences}."
    )


def check_data(stage: Stage, checkpoint: Checkpoint) -> None:
    """Raises RunFailed if the images or labels are not those that a run was trained on."""
    now, then = stage.dataset, checkpoint.dataset
    if changes := diff_fingerprints(now, then):
        raise RunFailed(f"the run was trained on other data: {'; '.join(changes)}.")
    for name, expected in ((then or {}).get("hashes") or {}).items():
        if expected is not None and now["hashes"][name] != expected:
            raise RunFailed(
                f"at least one of the {name} images or labels is not what the run was trained on. "
                "If nobody changed them, another version of a decoder may round differently."
            )


def describe_differences(stage: Stage, checkpoint: Checkpoint) -> str:
    """Returns why steps on these devices may round differently than in a run, or an empty string if
    they do not."""
    then, now = checkpoint.environment, stage.devices.describe()
    if then is None:
        return "it is not known where the run was trained"
    phrases = [
        f"{name.replace('_', ' ')} {now[name]} here, {then.get(name)} in the run"
        for name in now if name != "versions" and now[name] != then.get(name)
    ] + [
        f"{name} {version} here, {then['versions'].get(name)} in the run"
        for name, version in now["versions"].items() if then["versions"].get(name) != version
    ]  # fmt: skip
    if stage.devices.list[0].platform != "cpu":
        if not stage.config.deterministic:
            phrases.append("the run was not deterministic")
        if stage.steps_per_dispatch > 1:
            phrases.append("several steps were taken per dispatch")
    return "; ".join(phrases)


def replay(
    stage: Stage, state: TrainState, start: int, end: int
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Takes the steps of a stage from `start` to `end`. Returns the state, and the metrics of the
    steps that were not skipped."""
    feed, validation = stage.build_feeds()
    rows, skipped = [], int(stage.devices.fetch(state.skipped))
    with Progress(f"repeating {stage.name}", end - start, "steps") as progress:
        for step in range(start, end):
            state, metrics = stage.train_step(state, feed.batch(step))
            (row,) = stage.devices.fetch(metrics).unpack()
            if row.pop("skipped") == skipped:
                rows.append(row)
            else:
                skipped += 1
            progress.update(1)
    for opened in (feed, validation):
        opened.close()
    return state, rows


def compare_arrays(name: str, state: TrainState, checkpoint: Checkpoint) -> None:
    """Raises RunFailed if an array of a state differs from that of a checkpoint."""
    expected = flatten_arrays(fill(state, checkpoint.arrays))
    for path, array in flatten_arrays(state).items():
        if not np.array_equal(array, expected[path], equal_nan=True):
            difference = np.abs(np.subtract(array, expected[path], dtype=np.float64)).max()
            raise RunFailed(
                f"{name}: the settings and data do not produce the checkpoint of step "
                f"{checkpoint.step}: the array {'.'.join(path)} differs by up to {difference:.2g}."
            )


def compare_metrics(stage: Stage, rows: list[dict[str, Any]], logged: dict[str, Any]) -> None:
    """Raises RunFailed if the means of metrics differ from those in the log by more than rounding
    can explain, or if there is nothing to compare."""
    is_exact = stage.config.dtype == "float32" and stage.devices.list[0].platform == "cpu"
    tolerance = 1e-3 if is_exact else 3e-2
    means = {name: x for name, x in average_metrics(rows).items() if name in logged}
    failed = f"{stage.name}: the settings and data do not produce the log of step {logged['step']}"
    if not means:
        raise RunFailed(f"{failed}: it has none of the metrics of these steps.")
    for name, value in means.items():
        if not abs(value - logged[name]) <= max(tolerance * abs(logged[name]), 0.1 * tolerance):
            raise RunFailed(f"{failed}: {name} is {value:.6g}, not {logged[name]:.6g}.")
