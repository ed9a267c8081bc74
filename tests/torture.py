#!/usr/bin/env python3
"""A small run of both stages that is killed, harmed and moved, again and again, by seed; at the end
it must be what a run is that nothing happened to.

    python tests/torture.py --faults 200 --seed 1

Three quarters of the faults befall a run whose devices stay the same: its last checkpoints and its
log must equal the unbroken run's bit for bit. The others befall a run that moves between one, two
and four devices and two processes: it must take every step once, and the first step after each move
must be the one that one device would take. Exits with status 1 where anything was lost.
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

EVERY = 5  # steps to a checkpoint
# Images so small that BatchNorm adds up at most 200 values of a channel. XLA's CPU code adds some
# 500 one after another (more of them in a tree): 400 equal values err by 4e-6, which the gradient
# of a bias before BatchNorm, where most cancels, makes more than a move is allowed.
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
LAYOUTS = ("1", "2", "4", "2x1")  # devices, or processes x devices of each


Table = collections.Counter


class Lost(Exception):
    """Something that should have survived did not."""


@dataclasses.dataclass
class Place:
    """Where everything lies. The run and the image cache are on `disk`, what the programs may
    write besides in `home`."""

    folder: Path
    disk: disks.Disk | None
    rng: random.Random
    steps: dict[str, int]
    harmed: set[int] = dataclasses.field(default_factory=set)  # inodes of checkpoints

    @property
    def area(self) -> Path:
        return self.folder if self.disk is None else self.disk.folder

    @property
    def run(self) -> Path:
        return self.area / "run"

    def command(self, stage: str, workdir: Path) -> list[str]:
        cadence = {"checkpoint-every": EVERY, "log-every": 1, "steps": self.steps[stage]}
        told = [f"--{stage}.{name}={value}" for name, value in cadence.items()]
        data = ["--data.path", self.folder / "my pictures", "--data.cache", self.area / "cache"]
        return [*SETTINGS[stage], *told, *map(str, data), "--workdir", str(workdir)]

    def environment(self, devices: int) -> dict[str, str]:
        home = self.folder / "home"
        # With the programs' own cache of what is compiled, which the faults then meet as well.
        own = {key: x for key, x in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        return own | {
            "PYTHONPATH": str(ROOT),
            # This is about what is kept, and both runs are compiled alike.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {commands.QUICK}",
            "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home / "tmp"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip


class Running:
    """A command in one process or in two, by layout."""

    def __init__(self, place: Place, command: list[str], layout: str):
        processes, _, devices = layout.rpartition("x")
        self.out = place.folder / "out"
        self.out.mkdir(exist_ok=True)
        self.processes: list[subprocess.Popen] = []
        port = commands.free_port()
        for number in range(int(processes or 1)):
            told = []
            if processes:
                told = [
                    "--distributed", "--coordinator-address", f"127.0.0.1:{port}",
                    "--num-processes", processes, "--process-id", str(number),
                    "--initialization-timeout", "30",
                ]  # fmt: skip
            with (self.out / f"{number}.txt").open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / command[0]), *command[1:], *told],
                        env=place.environment(int(devices)),
                        stdout=file,
                        stderr=file,
                    )
                )

    def over(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def end(self, seconds: float = 300) -> list[int]:
        """Waits for all, and answers how each ended."""
        try:
            return [process.wait(seconds) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            for process in self.processes:
                process.kill()
            raise Lost(f"it did not end within {seconds} seconds: {self.said()}") from error

    def said(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.out.iterdir()))

    def until(self, holds: Callable[[], object], seconds: float = 300) -> bool:
        """Waits until something holds, and answers whether it came to that before the end."""
        deadline = time.monotonic() + seconds
        while not holds():
            if self.over():
                return False
            if time.monotonic() > deadline:
                raise Lost(f"nothing came of it in {seconds} seconds: {self.said()}")
            time.sleep(0.003)
        return True


def logged(workdir: Path, stage: str) -> list[dict]:
    file = workdir / "metrics" / f"{stage}.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def saved(workdir: Path, stage: str) -> list[int]:
    return Store(workdir, stage).steps()


def stopped(place: Place, running: Running, signum: int) -> None:
    """A signal to one of the processes, after which all end as they should."""
    struck = place.rng.randrange(len(running.processes))
    running.processes[struck].send_signal(signum)
    codes = running.end()
    # 0: it had ended just before; less than 0: it had hardly begun
    expected = {-signum, 0} if signum == signal.SIGKILL else {128 + signum, -signum, 0}
    if len(codes) > 1:  # JAX ends the other, or in its beginning it does not find this one
        expected |= {1, 2, -signal.SIGABRT}
    if not set(codes) <= expected:
        raise Lost(f"{signal.Signals(signum).name} ended it with {codes}: {running.said()}")


def takes(place: Place, running: Running, stage: str, step: int) -> bool:
    """Waits until a run has taken a step, and answers whether it came to that. The log may have
    rows of it from before, which are cut off when training begins."""
    return running.until(
        lambda: (
            "Training stage" in running.said()
            and any(row["step"] >= step for row in logged(place.run, stage)[-1:])
        )
    )


def any_signal(place: Place) -> int:
    return place.rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])


# Faults. Those of a run answer by their name in the table; those at rest harm files.


def killed_at_a_step(place: Place, stage: str, layout: str) -> None:
    last = max(saved(place.run, stage), default=0)
    step = last + place.rng.randint(1, EVERY + 3)
    running = Running(place, place.command(stage, place.run), layout)
    takes(place, running, stage, step)
    stopped(place, running, any_signal(place))


def killed_at_the_beginning(place: Place, stage: str, layout: str) -> None:
    running = Running(place, place.command(stage, place.run), layout)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.processes[0].wait(place.rng.uniform(0.5, 8))
    stopped(place, running, any_signal(place))


def killed_in_a_save(place: Place, stage: str, layout: str) -> None:
    running = Running(place, place.command(stage, place.run), layout)
    folder = place.run / "checkpoints" / stage
    running.until(lambda: list(folder.glob("*.orbax-checkpoint-tmp*")))
    stopped(place, running, signal.SIGKILL)


def full_disk(place: Place, stage: str, layout: str) -> None:
    """The disk is full for some saves; then there is room, and a checkpoint; then it is killed."""
    assert place.disk is not None
    last = max(saved(place.run, stage), default=0)
    running = Running(place, place.command(stage, place.run), layout)
    if not takes(place, running, stage, last + 1):
        running.end()
        return
    place.disk.fill(place.rng.choice([0, 4096, 65536]))
    try:
        running.until(lambda: "could not be written" in running.said(), 60)
    finally:
        place.disk.free()
    failed = max(saved(place.run, stage), default=0)
    running.until(lambda: max(saved(place.run, stage), default=0) > failed)
    if running.over():
        codes = running.end()
        if not set(codes) <= {0, 1}:  # 1: its last checkpoint found no room
            raise Lost(f"a full disk ended it with {codes}: {running.said()}")
        return
    stopped(place, running, any_signal(place))


def harm(file: Path, rng: random.Random) -> bool:
    """Flips a bit of a file, cuts it short, or removes it."""
    way, content = rng.choice(["flip", "cut", "remove"]), bytearray(file.read_bytes())
    if way == "remove" or not content:
        file.unlink()
    elif way == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return True


def one_file(folder: Path, rng: random.Random, pattern: str = "*") -> Path | None:
    files = sorted(p for p in folder.rglob(pattern) if p.is_file()) if folder.is_dir() else []
    return rng.choice(files) if files else None


def harmed_checkpoint(place: Place, stage: str) -> bool:
    """Harms the newest checkpoint, where there is another that was not harmed."""
    folder = place.run / "checkpoints" / stage
    known = {step: (folder / str(step)).stat().st_ino for step in saved(place.run, stage)}
    whole = [step for step, inode in known.items() if inode not in place.harmed]
    if len(whole) < 2 or max(known) not in whole:
        return False
    file = one_file(folder / str(max(known)), place.rng)
    assert file is not None
    place.harmed.add(known[max(known)])
    return harm(file, place.rng)


def harmed_tokens(place: Place, stage: str) -> bool:
    file = one_file(place.run / "tokens", place.rng)
    return file is not None and harm(file, place.rng)


def harmed_cache(place: Place, stage: str) -> bool:
    file = one_file(place.area / "cache", place.rng)
    return file is not None and harm(file, place.rng)


def torn_log(place: Place, stage: str) -> bool:
    """The log ends in the middle of a line, of a step that will be taken again."""
    file, newest = place.run / "metrics" / f"{stage}.jsonl", max(saved(place.run, stage), default=0)
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        return False  # it is torn already
    kept = [line for line in lines if json.loads(line)["step"] <= newest]
    if len(kept) == len(lines):
        return False
    torn = lines[len(kept)]
    file.write_bytes(b"".join([*kept, torn[: len(torn) // 2]]))
    return True


RUNNING: dict[str, Callable[[Place, str, str], None]] = {
    "killed at a step": killed_at_a_step,
    "killed at the beginning": killed_at_the_beginning,
    "killed in a save": killed_in_a_save,
    "full disk": full_disk,
}
AT_REST: dict[str, Callable[[Place, str], bool]] = {
    "newest checkpoint harmed": harmed_checkpoint,
    "tokens harmed": harmed_tokens,
    "image cache harmed": harmed_cache,
    "log torn": torn_log,
}


def deck(place: Place) -> Iterator[str]:
    """Kinds of faults by seed, each as often as the others."""
    kinds = [*RUNNING, *AT_REST, "killed at a step", "newest checkpoint harmed"]
    if place.disk is None:
        kinds.remove("full disk")
    while True:
        place.rng.shuffle(kinds)
        yield from kinds


def finished(place: Place, command: list[str], layout: str) -> None:
    running = Running(place, command, layout)
    codes = running.end(1200)
    if set(codes) != {0}:
        raise Lost(f"it ended with {codes}: {running.said()}")


def check_first_step(place: Place, stage: str, layout: str) -> None:
    """The next step, here and on one device, from one checkpoint."""
    found = {}
    for where in ("1", layout):
        out = place.folder / "step.pickle"
        processes, _, devices = where.rpartition("x")
        told = ["tests/one_step.py", str(place.run), stage, str(out), "--devices", devices]
        finished(place, told, where)
        found[where] = pickle.loads(out.read_bytes())
    one, here = found["1"], found[layout]
    np.testing.assert_array_equal(here["seen"], one["seen"])
    for part in ("step", "metrics", "gradients", "extra"):
        golden.assert_trees_close(here[part], one[part], f"{layout} {part} ", 1e-5, 1e-6)


def tortured(place: Place, stage: str, faults: int, layout: str | None, done: Table) -> None:
    """One stage with so many faults, to its end: by one layout, or by all of them in turn."""
    here, kinds, count = layout or "1", deck(place), 0
    while count < faults:
        if max(saved(place.run, stage), default=0) >= place.steps[stage]:
            raise Lost(f"{stage} was over after {count} of {faults} faults; give it more steps")
        kind = next(kinds)
        if layout is None and saved(place.run, stage) and place.rng.random() < 0.4:
            kind, here = "moved", place.rng.choice([x for x in LAYOUTS if x != here])
            check_first_step(place, stage, here)
        elif kind in RUNNING:
            RUNNING[kind](place, stage, here)
        elif not AT_REST[kind](place, stage):
            continue
        count += 1
        done[kind, stage] += 1
        which = "moving" if layout is None else "still"
        print(f"{count:4d} of {faults}  {which:6}  {stage:5}  {here:>3}  {kind}", flush=True)
    finished(place, place.command(stage, place.run), here)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def check_same_run(place: Place, unbroken: Path) -> None:
    """Bit for bit, and the log with it."""
    for stage, steps in place.steps.items():
        found, expected = (
            Store(workdir, stage).read(steps).arrays for workdir in (place.run, unbroken)
        )
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array, err_msg=".".join(path))
        if logged(place.run, stage) != logged(unbroken, stage):
            raise Lost(f"the log of {stage} is not the unbroken run's")


def check_every_step_once(place: Place) -> None:
    for stage, steps in place.steps.items():
        taken = [row["step"] for row in logged(place.run, stage) if row["split"] == "train"]
        if taken != list(range(1, steps + 1)):
            raise Lost(f"the steps of {stage} were not each taken once: {taken}")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[disks.Disk | None]:
    """A disk that can be filled; None where none may be mounted."""
    try:
        with disks.mounted(folder, 64) as disk:
            yield disk
    except disks.NoDisk as error:
        print(f"No disk is filled: {error}.")
        yield None


def ordeal(folder: Path, faults: int, seed: int, moving: bool, done: Table) -> None:
    """One run of both stages with so many faults."""
    folder.mkdir()
    (folder / "home" / "tmp").mkdir(parents=True)
    pictures.write_folder(folder / "my pictures")
    (folder / "neighbour").mkdir()
    (folder / "neighbour" / "notes.txt").write_text("mine")
    before = {name: contents(folder / name) for name in ("my pictures", "neighbour")}
    of_stage = {"vqgan": faults - faults // 2, "prior": faults // 2}
    steps = {stage: 2 * EVERY * count + 20 for stage, count in of_stage.items()}
    with small_disk(folder / "disk") as disk:
        place = Place(folder, disk, random.Random(seed), steps)
        layout = None if moving else place.rng.choice(LAYOUTS[:3])
        if layout is not None:
            for stage in steps:
                finished(place, place.command(stage, folder / "unbroken"), layout)
        for stage, count in of_stage.items():
            tortured(place, stage, count, layout, done)
        check_every_step_once(place)
        if layout is not None:
            check_same_run(place, folder / "unbroken")
        after = {name: contents(folder / name) for name in before}
        if before != after:
            raise Lost("something beside the run was touched")
        known = {"my pictures", "neighbour", "home", "disk", "out", "unbroken", "step.pickle"}
        strange = {p.name for p in folder.iterdir()} - known - {"run", "cache"}
        if strange:
            raise Lost(f"something was left beside the run: {sorted(strange)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="a new folder, kept; else one that is removed")
    given = parser.parse_args()
    begun = time.monotonic()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="taming_jax-torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    moving = given.faults // 4
    shares = {"still": given.faults - moving, "moving": moving}
    tables = {name: Table() for name in shares}
    with ThreadPoolExecutor() as side_by_side:
        both = [
            side_by_side.submit(
                ordeal, folder / name, faults, given.seed + n, name == "moving", tables[name]
            )
            for n, (name, faults) in enumerate(shares.items())
        ]
    done = sum(tables.values(), Table())
    errors = [future.exception() for future in both]
    for error in errors:
        if not isinstance(error, Lost | AssertionError | None):
            raise error
    lost = "; ".join(str(error) for error in errors if error is not None)
    if given.folder is None and not lost:
        shutil.rmtree(folder)
    print(f"{'fault':<28}{'stage 1':>8}{'stage 2':>8}")
    for kind in dict.fromkeys(kind for kind, _ in done):
        print(f"{kind:<28}{done[kind, 'vqgan']:>8}{done[kind, 'prior']:>8}")
    minutes = (time.monotonic() - begun) / 60
    print(f"{sum(done.values())} faults with seed {given.seed}, {minutes:.0f} minutes.")
    if lost:
        print(f"LOST (see {folder}): {lost}")
        return 1
    print("Nothing was lost: the run that stayed is the unbroken one, bit for bit; the one that "
          "moved took every step once, each first step as one device would.")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
