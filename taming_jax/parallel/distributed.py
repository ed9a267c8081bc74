"""Several processes as one run, by jax.distributed: how they begin, and how they agree on things.

Where a process is lost, JAX ends the others with a message of its own. Everything here does nothing
where there is one process only.
"""

import importlib.metadata
import os
import pickle
import platform
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from taming_jax import progress
from taming_jax.errors import RunFailed, UserError, say

HEARTBEAT = 60  # seconds of silence after which a process counts as gone
CHUNK = 2**26  # bytes broadcast at once; each device holds them twice

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """How several processes, each with its own devices, train as one. It is no part of the config:
    it differs from process to process."""

    distributed: bool = False
    """Train with other processes: those that Slurm, Open MPI or Kubernetes started with this one,
    or those that the next settings tell of."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, where all of them meet; alone enough under mpirun."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""
    initialization_timeout: int = 300
    """Seconds to wait for the others."""


def join(given: Processes) -> None:
    """Joins the other processes, if there are to be any; called before JAX starts. UserError where
    the settings cannot work, or the others cannot be reached."""
    address, own = given.coordinator_address, (given.num_processes, given.process_id)
    if not given.distributed:
        if any(value is not None for value in (address, *own)):
            raise UserError(
                "--coordinator-address, --num-processes and --process-id belong to --distributed; "
                "add it, or leave them out."
            )
        return
    if address is not None and own == (None, None) and "OMPI_COMM_WORLD_RANK" in os.environ:
        # Of Open MPI's variables JAX knows version 4's alone, which name the address.
        own = int(os.environ["OMPI_COMM_WORLD_SIZE"]), int(os.environ["OMPI_COMM_WORLD_RANK"])
    import jax

    # JAX would take SIGTERM for itself; this program saves at one.
    jax.config.update("jax_enable_preemption_service", False)
    say(f"Waiting for the other processes, for up to {given.initialization_timeout} seconds.")
    try:
        if address is not None and own[1] is not None:
            check_coordinator(address, own[1], given.initialization_timeout)
        jax.distributed.initialize(
            address, *own, initialization_timeout=given.initialization_timeout,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (ValueError, LookupError, RuntimeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the processes cannot be joined ({reason}). Give each the same --coordinator-address "
            "HOST:PORT, a free port of process 0, --num-processes and its own --process-id; or "
            "none of them, where Slurm, Open MPI or Kubernetes started the processes."
        ) from error


def check_coordinator(address: str, process: int, timeout: float) -> None:
    """Raises OSError where process 0 cannot open its port, or another one cannot reach it within
    the timeout, and ValueError where the address is none: JAX would crash the process."""
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


def count() -> int:
    """How many processes there are."""
    import jax

    return jax.process_count()


def first() -> bool:
    """Whether this process is the one that writes."""
    import jax

    return jax.process_index() == 0


def one_speaks() -> None:
    """From here on the sentences of other processes than the first go nowhere; errors do not."""
    if not first():
        progress.silence()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def exchanged(value: Any) -> list[Any]:
    """What every process gives, by process. All of them must call this."""
    if count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    content = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = process_allgather(np.array([len(content)], np.int32)).reshape(-1)
    filled = np.pad(content, (0, lengths.max() - len(content)))
    rows = process_allgather(filled).reshape(len(lengths), -1)
    return [pickle.loads(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def agreed(function: Callable[[], T]) -> T:
    """What a function returns; where it fails in one process, all fail. It must not itself need
    the other processes."""
    error: BaseException | None = None
    try:
        value = function()
    except (UserError, RunFailed) as raised:
        error = raised
    errors = exchanged(error)
    if error is not None:
        raise error
    for process, other in enumerate(errors):
        if other is not None:
            raise type(other)(f"process {process}: {other}")
    return value


def from_first(function: Callable[[], T]) -> T:
    """What a function returns in process 0, which alone runs it, in every process; or what it
    raises there."""
    if count() == 1:
        return function()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    value = agreed(lambda: function() if first() else None)
    content = pickle.dumps(value) if first() else b""
    length = exchanged(len(content))[0]
    own = np.frombuffer(content.ljust(length), np.uint8)
    parts = [broadcast_one_to_all(own[at : at + CHUNK]) for at in range(0, length, CHUNK)]
    return pickle.loads(np.concatenate(parts).data)


def check_equal(
    value: T,
    compare: Callable[[T, T], list[str]],
    advice: str = "Start all processes with the same settings and the same packages.",
) -> None:
    """UserError, in every process, where one has another value than process 0. `compare` returns
    how two values differ, as phrases; `advice` is a sentence that follows them."""
    values = exchanged(value)
    for process, other in enumerate(values):
        if phrases := compare(other, values[0]):
            raise UserError(
                f"process {process} differs from process 0: {'; '.join(phrases)}. {advice}"
            )


def different_values(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The differing values of two dictionaries with the same keys, as phrases."""
    return [f"{k} is {left[k]}, not {right[k]}" for k in right if left[k] != right[k]]


PACKAGES = ("taming_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what is computed."""
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            versions[name] = "not installed"
    return versions
