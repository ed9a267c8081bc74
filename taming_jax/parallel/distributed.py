"""Makes several processes work as one: connects them with jax.distributed and keeps them
consistent.

If a process dies, JAX ends the others with a message. A single process does not communicate.
"""

import hashlib
import importlib.metadata
import os
import pickle
import platform
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from taming_jax import progress
from taming_jax.errors import RunFailed, UserError, say

HEARTBEAT = 60  # seconds without a heartbeat after which a process is considered dead
CHUNK = 2**26  # bytes per broadcast; every device holds them twice

# Open MPI's environment variables for the number of processes and the number of this one.
OPEN_MPI_SIZE, OPEN_MPI_RANK = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The settings for training with several processes, each with its own devices. They are not
    part of the config, since they differ between the processes."""

    distributed: bool = False
    """Train together with other processes, which Slurm, Open MPI or Kubernetes started, or which
    the following settings describe."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, to which all processes connect. Under Open MPI 5, you need to set
    only this and --distributed."""
    num_processes: int | None = None
    """The number of processes."""
    process_id: int | None = None
    """The number of this process, starting at 0."""
    initialization_timeout: int = 300
    """Seconds to wait for the other processes."""


def join(processes: Processes) -> None:
    """Connects to the other processes if `distributed` is set. Call it before JAX starts. Raises
    UserError for invalid settings, and if the other processes cannot be reached."""
    address, timeout = processes.coordinator_address, processes.initialization_timeout
    size, rank = processes.num_processes, processes.process_id
    if not processes.distributed:
        if any(value is not None for value in (address, size, rank)):
            raise UserError(
                "--coordinator-address, --num-processes and --process-id need --distributed; add "
                "it, or remove them."
            )
        return
    if address is not None and (size, rank) == (None, None) and OPEN_MPI_RANK in os.environ:
        # JAX reads only the variables of Open MPI 4, which include the address.
        size, rank = int(os.environ[OPEN_MPI_SIZE]), int(os.environ[OPEN_MPI_RANK])
    import jax

    # JAX would handle SIGTERM itself, but this program saves a checkpoint on SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    say(f"Waiting for the other processes, for up to {timeout} seconds.")
    try:
        if address is not None and rank is not None:
            check_coordinator(address, rank, timeout)
        jax.distributed.initialize(
            address, size, rank, initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (ValueError, LookupError, RuntimeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"cannot connect to the other processes ({reason}). Start each process with the same "
            "--coordinator-address HOST:PORT (a free port on the host of process 0) and "
            "--num-processes, "
            "and its own --process-id; under Slurm, Open MPI 4 or Kubernetes, omit all three, and "
            "under Open MPI 5, the last two."
        ) from error


def check_coordinator(address: str, process: int, timeout: float) -> None:
    """Raises OSError if process 0 cannot open its port or another process cannot reach it within
    the timeout, and ValueError for an invalid address. JAX would crash the process instead."""
    host, _, port = address.rpartition(":")
    if process == 0:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", int(port)))
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def process_count() -> int:
    """Returns the number of processes."""
    import jax

    return jax.process_count()


def is_primary() -> bool:
    """Returns whether this process is process 0, which writes the files."""
    import jax

    return jax.process_index() == 0


def silence_secondary() -> None:
    """Silences the standard output and the progress bars of this process if it is not process 0.
    Errors still appear."""
    if not is_primary():
        progress.silence()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def all_gather_objects(value: Any) -> list[Any]:
    """Returns the values of all processes, ordered by process. All processes must call this."""
    if process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    content = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = process_allgather(np.array([len(content)], np.int32)).reshape(-1)
    padded = np.pad(content, (0, lengths.max() - len(content)))
    rows = process_allgather(padded).reshape(len(lengths), -1)
    return [pickle.loads(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def run_on_all(function: Callable[[], T]) -> T:
    """Runs a function in every process and returns its result in this one. If it raises UserError
    or RunFailed in one process, all processes raise it. The function must not communicate with
    other processes."""
    error: BaseException | None = None
    try:
        value = function()
    except (UserError, RunFailed) as raised:
        error = raised
    errors = all_gather_objects(error)
    if error is not None:
        raise error
    for process, other in enumerate(errors):
        if other is not None:
            raise type(other)(f"process {process}: {other}")
    return value


def run_on_primary(function: Callable[[], T]) -> T:
    """Runs a function in process 0 only, and returns its result in every process. Raises its
    UserError or RunFailed in every process, and any other error only in process 0."""
    if process_count() == 1:
        return function()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    value = run_on_all(lambda: function() if is_primary() else None)
    content = pickle.dumps(value) if is_primary() else b""
    length = all_gather_objects(len(content))[0]
    padded = np.frombuffer(content.ljust(length), np.uint8)
    parts = [broadcast_one_to_all(padded[at : at + CHUNK]) for at in range(0, length, CHUNK)]
    return pickle.loads(np.concatenate(parts).data)


def check_equal(
    value: T,
    compare: Callable[[T, T], list[str]],
    advice: str = "Start all processes with the same settings and the same packages.",
) -> None:
    """Raises UserError in every process if the value of one differs from that of process 0.

    `compare` returns the differences between two values as phrases; `advice` is a sentence that
    follows them."""
    values = all_gather_objects(value)
    for process, other in enumerate(values):
        if phrases := compare(other, values[0]):
            raise UserError(
                f"process {process} differs from process 0: {'; '.join(phrases)}. {advice}"
            )


def describe_differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Returns the differences between two dictionaries with the same keys, as phrases."""
    return [f"{k} is {left[k]}, not {right[k]}" for k in right if left[k] != right[k]]


PACKAGES = ("taming_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def count_cores() -> int | None:
    """Returns the number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()


def hash_cpu() -> str:
    """Returns a hash of the model and features of the CPU, which affect compiled programs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = ("model name", "flags", "CPU part", "Features")  # x86-64, then Arm
        cpu = sorted({line for line in lines if line.startswith(names)})
    except OSError:
        cpu = [platform.machine(), platform.processor()]
    return hashlib.sha256("\n".join(cpu).encode()).hexdigest()[:12]


def get_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect the results."""
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # such as a source checkout on the path
            versions[name] = "not installed"
    return versions
