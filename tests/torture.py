#!/usr/bin/env python3
"""Injects faults into small runs of both stages: kills them, damages their files, and moves them to
other devices. The faults depend on the seed. At the end, nothing may be lost.

    python tests/torture.py --faults 200 --seed 1

Three quarters of the faults hit a run that always uses the same devices. Its last checkpoints and
its log must equal those of an uninterrupted run bit for bit. The other faults hit a run that moves
between one, two, and four devices, and two processes. It must take every step once, and the first
step after each move must equal the step that one device takes. Exits with status 1 if anything is
lost.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from taming_jax.training.checkpoints import Store  # noqa: E402
from tests import commands, disks, golden  # noqa: E402
from tests.data import pictures  # noqa: E402

CHECKPOINT_EVERY = 5  # steps
# The images are so small that BatchNorm sums at most 200 values per channel. XLA's CPU code sums up
# to about 500 values sequentially, and more of them in a tree. The sum of 400 equal values has an
# error of 4e-6. Cancellation in the gradient of a bias before BatchNorm amplifies it beyond the
# tolerance of `check_first_step`.
SETTINGS = {
    "vqgan": [
        "train_vqgan.py", "--config", "birds_tiny", "--data.name", "folder", "--data.image-size",
        "12", "--vqgan.channels", "4", "--vqgan.multipliers", "1", "--vqgan.batch-size", "8",
        "--vqgan.latent-channels", "8", "--vqgan.discriminator-layers", "1",
        "--vqgan.discriminator-filters", "4", "--vqgan.discriminator-start", "0.3",
        "--vqgan.warmup-steps", "5", "--vqgan.eval-every", "20", "--vqgan.draw-every", "1000000",
    ],
    "prior": [
        "train_prior.py", "--config", "birds_tiny", "--prior.batch-size", "8", "--prior.layers",
        "1", "--prior.width", "16", "--prior.augmented-versions", "2", "--prior.eval-every", "20",
        "--prior.draw-every", "1000000",
    ],
}  # fmt: skip
LAYOUTS = ("1", "2", "4", "2x1")  # devices, or processes x devices per process

Table = collections.Counter


class TortureError(Exception):
    """Raised if a run lost something or failed in an unexpected way."""


@dataclasses.dataclass
class Workspace:
    """The folders of a run. The run and the image cache are on `disk`; anything else that the
    programs write goes to `home`."""

    folder: Path
    disk: disks.Disk | None
    rng: random.Random
    steps: dict[str, int]
    damaged: set[int] = dataclasses.field(default_factory=set)  # inodes of checkpoints

    @property
    def area(self) -> Path:
        return self.folder if self.disk is None else self.disk.folder

    @property
    def run(self) -> Path:
        return self.area / "run"

    def command(self, stage: str, workdir: Path) -> list[str]:
        cadence = {"checkpoint-every": CHECKPOINT_EVERY, "log-every": 1, "steps": self.steps[stage]}
        flags = [f"--{stage}.{name}={value}" for name, value in cadence.items()]
        data = ["--data.path", self.folder / "my pictures", "--data.cache", self.area / "cache"]
        return [*SETTINGS[stage], *flags, *map(str, data), "--workdir", str(workdir)]

    def environment(self, devices: int) -> dict[str, str]:
        home = self.folder / "home"
        # Without this variable, the programs use their own compilation cache, so that the faults
        # affect it as well.
        inherited = {key: x for key, x in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        return inherited | {
            "PYTHONPATH": str(ROOT),
            # Fast compilation is enough, because both runs are compiled in the same way.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {commands.XLA_FLAGS}",
            "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home / "tmp"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip


class RunningCommand:
    """A command that runs in one process or in two, depending on the layout."""

    def __init__(self, space: Workspace, command: list[str], layout: str):
        processes, _, devices = layout.rpartition("x")
        self.out = space.folder / "out"
        self.out.mkdir(exist_ok=True)
        self.processes: list[subprocess.Popen] = []
        port = commands.find_free_port()
        for number in range(int(processes or 1)):
            flags = []
            if processes:
                flags = [
                    "--distributed", "--coordinator-address", f"127.0.0.1:{port}",
                    "--num-processes", processes, "--process-id", str(number),
                    "--initialization-timeout", "30",
                ]  # fmt: skip
            with (self.out / f"{number}.txt").open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / command[0]), *command[1:], *flags],
                        env=space.environment(int(devices)),
                        stdout=file,
                        stderr=file,
                    )
                )

    def has_ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float = 300) -> list[int]:
        """Waits for all processes and returns their exit statuses."""
        try:
            return [process.wait(seconds) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            for process in self.processes:
                process.kill()
            raise TortureError(
                f"the command did not end within {seconds} seconds: {self.output()}"
            ) from error

    def output(self) -> str:
        """Returns the output of all processes."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.out.iterdir()))

    def wait_until(self, condition: Callable[[], object], seconds: float = 300) -> bool:
        """Waits until a condition holds. Returns False if the command ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.has_ended():
                return False
            if time.monotonic() > deadline:
                raise TortureError(
                    f"a condition did not hold within {seconds} seconds: {self.output()}"
                )
            time.sleep(0.003)
        return True


def read_log(workdir: Path, stage: str) -> list[dict]:
    file = workdir / "metrics" / f"{stage}.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def list_saved_steps(workdir: Path, stage: str) -> list[int]:
    return Store(workdir, stage).steps()


def stop(space: Workspace, running: RunningCommand, signum: int) -> None:
    """Sends a signal to one of the processes and checks that all end with an expected status."""
    target = space.rng.randrange(len(running.processes))
    running.processes[target].send_signal(signum)
    codes = running.wait()
    # 0: the process ended just before the signal. Below 0: the process had just started.
    expected = {-signum, 0} if signum == signal.SIGKILL else {128 + signum, -signum, 0}
    if len(codes) > 1:  # JAX ends the other process, or the other one cannot connect to it
        expected |= {1, 2, -signal.SIGABRT}
    if not set(codes) <= expected:
        raise TortureError(
            f"{signal.Signals(signum).name} ended the command with {codes}: {running.output()}"
        )


def wait_for_step(space: Workspace, running: RunningCommand, stage: str, step: int) -> bool:
    """Waits until a run has taken a step. Returns False if the run ends before. Until training
    starts, the log may contain rows of later steps, which the run then cuts off."""
    return running.wait_until(
        lambda: (
            "Training stage" in running.output()
            and any(row["step"] >= step for row in read_log(space.run, stage)[-1:])
        )
    )


def choose_signal(space: Workspace) -> int:
    return space.rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])


# The faults. The table RUNNING lists those of a running command, AT_REST those that damage files
# between two commands.


def kill_at_step(space: Workspace, stage: str, layout: str) -> None:
    last = max(list_saved_steps(space.run, stage), default=0)
    step = last + space.rng.randint(1, CHECKPOINT_EVERY + 3)
    running = RunningCommand(space, space.command(stage, space.run), layout)
    wait_for_step(space, running, stage, step)
    stop(space, running, choose_signal(space))


def kill_at_start(space: Workspace, stage: str, layout: str) -> None:
    running = RunningCommand(space, space.command(stage, space.run), layout)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.processes[0].wait(space.rng.uniform(0.5, 8))
    stop(space, running, choose_signal(space))


def kill_in_save(space: Workspace, stage: str, layout: str) -> None:
    running = RunningCommand(space, space.command(stage, space.run), layout)
    folder = space.run / "checkpoints" / stage
    running.wait_until(lambda: list(folder.glob("*.orbax-checkpoint-tmp*")))
    stop(space, running, signal.SIGKILL)


def fill_disk(space: Workspace, stage: str, layout: str) -> None:
    """Fills the disk during some saves, frees it, waits for a checkpoint, and kills the run."""
    assert space.disk is not None
    last = max(list_saved_steps(space.run, stage), default=0)
    running = RunningCommand(space, space.command(stage, space.run), layout)
    if not wait_for_step(space, running, stage, last + 1):
        running.wait()
        return
    space.disk.fill(space.rng.choice([0, 4096, 65536]))
    try:
        running.wait_until(lambda: "could not be written" in running.output(), 60)
    finally:
        space.disk.free()
    failed = max(list_saved_steps(space.run, stage), default=0)
    running.wait_until(lambda: max(list_saved_steps(space.run, stage), default=0) > failed)
    if running.has_ended():
        codes = running.wait()
        if not set(codes) <= {0, 1}:  # 1: no space for the last checkpoint
            raise TortureError(f"a full disk ended the command with {codes}: {running.output()}")
        return
    stop(space, running, choose_signal(space))


def damage(file: Path, rng: random.Random) -> bool:
    """Flips a bit of a file, truncates it, or removes it."""
    kind, content = rng.choice(["flip", "cut", "remove"]), bytearray(file.read_bytes())
    if kind == "remove" or not content:
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return True


def choose_file(folder: Path, rng: random.Random, pattern: str = "*") -> Path | None:
    files = sorted(p for p in folder.rglob(pattern) if p.is_file()) if folder.is_dir() else []
    return rng.choice(files) if files else None


def damage_checkpoint(space: Workspace, stage: str) -> bool:
    """Damages the newest checkpoint if there is another undamaged one. Returns whether it did."""
    folder = space.run / "checkpoints" / stage
    inodes = {
        step: (folder / str(step)).stat().st_ino for step in list_saved_steps(space.run, stage)
    }
    intact = [step for step, inode in inodes.items() if inode not in space.damaged]
    if len(intact) < 2 or max(inodes) not in intact:
        return False
    file = choose_file(folder / str(max(inodes)), space.rng)
    assert file is not None
    space.damaged.add(inodes[max(inodes)])
    return damage(file, space.rng)


def damage_tokens(space: Workspace, stage: str) -> bool:
    file = choose_file(space.run / "tokens", space.rng)
    return file is not None and damage(file, space.rng)


def damage_cache(space: Workspace, stage: str) -> bool:
    file = choose_file(space.area / "cache", space.rng)
    return file is not None and damage(file, space.rng)


def truncate_log(space: Workspace, stage: str) -> bool:
    """Truncates the log in the middle of a row of a step that the run will repeat. Returns whether
    it did."""
    file = space.run / "metrics" / f"{stage}.jsonl"
    newest = max(list_saved_steps(space.run, stage), default=0)
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        return False  # already truncated
    kept = [line for line in lines if json.loads(line)["step"] <= newest]
    if len(kept) == len(lines):
        return False
    partial = lines[len(kept)]
    file.write_bytes(b"".join([*kept, partial[: len(partial) // 2]]))
    return True


RUNNING: dict[str, Callable[[Workspace, str, str], None]] = {
    "killed at a step": kill_at_step,
    "killed at the start": kill_at_start,
    "killed during a save": kill_in_save,
    "full disk": fill_disk,
}
AT_REST: dict[str, Callable[[Workspace, str], bool]] = {
    "newest checkpoint damaged": damage_checkpoint,
    "tokens damaged": damage_tokens,
    "image cache damaged": damage_cache,
    "log truncated": truncate_log,
}


def draw_faults(space: Workspace) -> Iterator[str]:
    """Yields kinds of faults: each round shuffles all of them."""
    kinds = [*RUNNING, *AT_REST, "killed at a step", "newest checkpoint damaged"]
    if space.disk is None:
        kinds.remove("full disk")
    while True:
        space.rng.shuffle(kinds)
        yield from kinds


def run_to_end(space: Workspace, command: list[str], layout: str) -> None:
    """Runs a command and checks that it succeeds."""
    running = RunningCommand(space, command, layout)
    codes = running.wait(1200)
    if set(codes) != {0}:
        raise TortureError(f"the command ended with {codes}: {running.output()}")


def check_first_step(space: Workspace, stage: str, layout: str) -> None:
    """Checks that the next step in a layout equals the next step on one device, both from the same
    checkpoint."""
    results = {}
    for current in ("1", layout):
        out = space.folder / "step.pickle"
        processes, _, devices = current.rpartition("x")
        command = ["tests/one_step.py", str(space.run), stage, str(out), "--devices", devices]
        run_to_end(space, command, current)
        results[current] = pickle.loads(out.read_bytes())
    expected, actual = results["1"], results[layout]
    np.testing.assert_array_equal(actual["seen"], expected["seen"])
    for part in ("step", "metrics", "gradients", "extra"):
        golden.assert_trees_close(actual[part], expected[part], f"{layout} {part} ", 1e-5, 1e-6)


def torture_stage(
    space: Workspace, stage: str, faults: int, layout: str | None, counts: Table
) -> None:
    """Trains a stage to its end while injecting faults, in one layout or, if None, in all."""
    current, kinds, count = layout or "1", draw_faults(space), 0
    while count < faults:
        if max(list_saved_steps(space.run, stage), default=0) >= space.steps[stage]:
            raise TortureError(
                f"{stage} ended after {count} of {faults} faults; increase the number of steps"
            )
        kind = next(kinds)
        if layout is None and list_saved_steps(space.run, stage) and space.rng.random() < 0.4:
            kind, current = "moved", space.rng.choice([x for x in LAYOUTS if x != current])
            check_first_step(space, stage, current)
        elif kind in RUNNING:
            RUNNING[kind](space, stage, current)
        elif not AT_REST[kind](space, stage):
            continue
        count += 1
        counts[kind, stage] += 1
        run_name = "moving" if layout is None else "still"
        print(f"{count:4d} of {faults}  {run_name:6}  {stage:5}  {current:>3}  {kind}", flush=True)
    run_to_end(space, space.command(stage, space.run), current)


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the hash of every file below a folder, by path."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def check_same_run(space: Workspace, reference: Path) -> None:
    """Checks that the last checkpoints and the logs of two runs are equal bit for bit."""
    for stage, steps in space.steps.items():
        actual, expected = (
            Store(workdir, stage).read(steps).arrays for workdir in (space.run, reference)
        )
        for path, array in expected.items():
            np.testing.assert_array_equal(actual[path], array, err_msg=".".join(path))
        if read_log(space.run, stage) != read_log(reference, stage):
            raise TortureError(f"the log of {stage} differs from that of the uninterrupted run")


def check_every_step_once(space: Workspace) -> None:
    for stage, steps in space.steps.items():
        taken = [row["step"] for row in read_log(space.run, stage) if row["split"] == "train"]
        if taken != list(range(1, steps + 1)):
            raise TortureError(f"the run did not take each step of {stage} once: {taken}")


@contextlib.contextmanager
def mount_small_disk(folder: Path) -> Iterator[disks.Disk | None]:
    """Mounts a disk that can be filled. Yields None if mounting is not possible."""
    try:
        with disks.mount(folder, 64) as disk:
            yield disk
    except disks.NoDisk as error:
        print(f"Skipping the faults of a full disk: {error}.")
        yield None


def torture_run(folder: Path, faults: int, seed: int, moving: bool, counts: Table) -> None:
    """Trains both stages of a run while injecting faults."""
    folder.mkdir()
    (folder / "home" / "tmp").mkdir(parents=True)
    pictures.write_folder(folder / "my pictures")
    (folder / "neighbor").mkdir()
    (folder / "neighbor" / "notes.txt").write_text("mine")
    before = {name: hash_files(folder / name) for name in ("my pictures", "neighbor")}
    faults_per_stage = {"vqgan": faults - faults // 2, "prior": faults // 2}
    steps = {stage: 2 * CHECKPOINT_EVERY * count + 20 for stage, count in faults_per_stage.items()}
    with mount_small_disk(folder / "disk") as disk:
        space = Workspace(folder, disk, random.Random(seed), steps)
        layout = None if moving else space.rng.choice(LAYOUTS[:3])
        if layout is not None:
            for stage in steps:
                run_to_end(space, space.command(stage, folder / "uninterrupted"), layout)
        for stage, count in faults_per_stage.items():
            torture_stage(space, stage, count, layout, counts)
        check_every_step_once(space)
        if layout is not None:
            check_same_run(space, folder / "uninterrupted")
        after = {name: hash_files(folder / name) for name in before}
        if before != after:
            raise TortureError("a file outside the run was changed")
        expected = {"my pictures", "neighbor", "home", "disk", "out", "uninterrupted"}
        expected |= {"step.pickle", "run", "cache"}
        unexpected = {p.name for p in folder.iterdir()} - expected
        if unexpected:
            raise TortureError(f"files were left outside the run: {sorted(unexpected)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="a new folder that is kept; default: a temporary one"
    )
    args = parser.parse_args()
    start = time.monotonic()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="taming_jax-torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    moving = args.faults // 4
    shares = {"still": args.faults - moving, "moving": moving}
    tables = {name: Table() for name in shares}
    with ThreadPoolExecutor() as executor:
        futures = [
            executor.submit(
                torture_run, folder / name, faults, args.seed + n, name == "moving", tables[name]
            )
            for n, (name, faults) in enumerate(shares.items())
        ]
    counts = sum(tables.values(), Table())
    errors = [future.exception() for future in futures]
    for error in errors:
        if not isinstance(error, TortureError | AssertionError | None):
            raise error
    failures = "; ".join(str(error) for error in errors if error is not None)
    if args.folder is None and not failures:
        shutil.rmtree(folder)
    print(f"{'fault':<28}{'stage 1':>8}{'stage 2':>8}")
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(f"{kind:<28}{counts[kind, 'vqgan']:>8}{counts[kind, 'prior']:>8}")
    minutes = (time.monotonic() - start) / 60
    print(f"{sum(counts.values())} faults with seed {args.seed}, {minutes:.0f} minutes.")
    if failures:
        print(f"LOST (see {folder}): {failures}")
        return 1
    print(
        "Nothing was lost: the run that did not move equals the uninterrupted run bit for bit. The "
        "run that moved took every step once, and each first step after a move as one device does."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
