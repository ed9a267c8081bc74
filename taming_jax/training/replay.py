"""Checks that the checkpoints of a run are what its settings and data produce, by taking some of
its steps again."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.config.load import update_data_settings
from taming_jax.config.schema import Config
from taming_jax.data import datasets
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.parallel.devices import Devices, copy_buffers
from taming_jax.parallel.runtime import prepare
from taming_jax.progress import Progress
from taming_jax.storage import read_arrays
from taming_jax.training.checkpoints import Checkpoint, Store
from taming_jax.training.loop import average_metrics
from taming_jax.training.prior import PriorStage
from taming_jax.training.stage import Stage
from taming_jax.training.state import TrainState
from taming_jax.training.vqgan import VQGANStage
from taming_jax.training.writers import read_rows
from taming_jax.weights.arrays import fill, flatten_arrays

STAGES: dict[str, type[Stage]] = {"vqgan": VQGANStage, "prior": PriorStage}
# The relative difference of metrics, and the smallest absolute one, that rounding may cause within
# the steps of a line of the log.
TOLERANCE, FLOOR = 1e-3, 1e-4


def verify_run(folder: Path) -> None:
    """Verifies each stage of a run, and says what it found. Raises RunFailed at the first thing
    that is not what it should be, and UserError if the folder holds no run."""
    stores = [store for name in STAGES if (store := Store(folder, name)).steps()]
    if not stores:
        raise UserError(f"{folder} holds no checkpoints; name the folder of a run.")
    last = {}  # of each stage, up to two
    for store in stores:
        name, steps = store.path.name, store.steps()
        last[name] = [read_checkpoint(store, step) for step in steps][-2:]
        say(f"{name}: the hashes of the checkpoints of steps {format_steps(steps)} are right.")
    check_tokens(folder / "tokens")
    for name, checkpoints in last.items():
        verify_stage(folder, name, checkpoints)


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


def verify_stage(folder: Path, name: str, checkpoints: list[Checkpoint]) -> None:
    """Replays the steps before the last of a stage's checkpoints, or as many as make sense on this
    machine."""
    last = checkpoints[-1]
    config = update_data_settings(last.config, folder)
    config = dataclasses.replace(config, workdir=str(folder))
    prepare(config)
    check_data(config, last)
    start = checkpoints[-2] if len(checkpoints) > 1 else None
    begins_elsewhere = getattr(config, name).init_from is not None
    if last.weights_only or (start.weights_only if start else begins_elsewhere):
        say(f"{name}: no steps can be replayed, since the run began with other weights.")
        return
    count = (last.environment or {}).get("devices", 1)
    devices = Devices(count if count <= jax.device_count() else 1)
    stage = STAGES[name](config, devices)
    state = stage.init(jax.random.key(config.seed))
    if start is not None:
        state = fill(state, start.arrays)
    state = copy_buffers(devices.replicate(state))
    first = 0 if start is None else start.step
    differences = describe_differences(devices, config, last)
    if differences:
        rows = read_rows(folder / "metrics" / f"{name}.jsonl")
        row = next((x for x in rows if x["split"] == "train" and x["step"] > first), None)
        if row is None:
            say(f"{name}: no steps can be compared, since the log has none after step {first}.")
            return
        compare_metrics(name, replay(stage, state, first, row["step"])[1], row)
        say(
            f"{name}: {format_range(first, row['step'])} repeated, with the metrics of the log, up "
            f"to rounding. The state was not compared bit for bit: {differences}."
        )
    else:
        state, _ = replay(stage, state, first, last.step)
        compare_arrays(name, devices.fetch(state), last)
        say(
            f"{name}: {format_range(first, last.step)} repeated, and every array is that of the "
            "last checkpoint, bit for bit: it is what these settings and data produce."
        )


def check_data(config: Config, checkpoint: Checkpoint) -> None:
    """Raises RunFailed if the images or labels are not those that a run was trained on."""
    now, then = datasets.fingerprint(datasets.load(config.data)), checkpoint.dataset
    if changes := datasets.fingerprint_diff(now, then):
        raise RunFailed(f"the run was trained on other data: {'; '.join(changes)}.")
    for name, expected in ((then or {}).get("hashes") or {}).items():
        if expected is not None and now["hashes"][name] != expected:
            raise RunFailed(
                f"at least one of the {name} images or labels is not what the run was trained on. "
                "If nobody changed them, another version of a decoder may round differently."
            )


def describe_differences(devices: Devices, config: Config, checkpoint: Checkpoint) -> str:
    """Returns why steps on these devices may round differently than in a run, or an empty string if
    they do not."""
    then, now = checkpoint.environment, devices.describe()
    if then is None:
        return "it is not known where the run was trained"
    phrases = [
        f"{name.replace('_', ' ')} {now[name]} here, {then[name]} in the run"
        for name in now if name != "versions" and now[name] != then[name]
    ] + [
        f"{name} {version} here, {then['versions'].get(name)} in the run"
        for name, version in now["versions"].items() if then["versions"].get(name) != version
    ]  # fmt: skip
    if devices.list[0].platform != "cpu" and not config.deterministic:
        phrases.append("the run was not deterministic")
    return "; ".join(phrases)


def replay(
    stage: Stage, state: TrainState, start: int, end: int
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Takes the steps of a stage from `start` to `end`, and returns the state and the metrics."""
    feed, validation = stage.build_feeds()
    rows = []
    with Progress(f"replaying {stage.name}", end - start, "steps") as progress:
        for step in range(start, end):
            state, metrics = stage.train_step(state, feed.batch(step))
            rows += stage.devices.fetch(metrics).unpack()
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


def compare_metrics(name: str, rows: list[dict[str, Any]], logged: dict[str, Any]) -> None:
    """Raises RunFailed if the means of metrics differ from those in the log by more than rounding
    can explain."""
    for metric, value in average_metrics(rows).items():
        if metric == "skipped" or metric not in logged:
            continue
        if abs(value - logged[metric]) > max(TOLERANCE * abs(logged[metric]), FLOOR):
            raise RunFailed(
                f"{name}: the settings and data do not produce the log of step {logged['step']}: "
                f"{metric} is {value:.6g}, not {logged[metric]:.6g}."
            )
