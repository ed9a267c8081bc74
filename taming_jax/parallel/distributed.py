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
CHUNK = 2**26  # bytes sent at once

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


def checked(given: Processes) -> Processes:
    """The settings themselves; UserError where they cannot work."""
    told = (given.coordinator_address, given.num_processes, given.process_id)
    names = "--coordinator-address, --num-processes and --process-id"
    if not given.distributed:
        if any(value is not None for value in told):
            raise UserError(f"{names} belong to --distributed; add it, or leave them out.")
        return given
    if any(value is None for value in told) and any(value is not None for value in told):
        raise UserError(
            f"{names} belong together; give all of them, or none where Slurm, Open MPI or "
            "Kubernetes started the processes."
        )
    if given.initialization_timeout < 1:
        raise UserError("--initialization-timeout must be 1 second or more.")
    if given.coordinator_address is None:
        return given
    host, _, port = given.coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator-address {given.coordinator_address} is not HOST:PORT; name a machine "
            "and a free port of it, such as 10.0.0.1:8476."
        )
    count, number = given.num_processes or 0, given.process_id or 0
    if not 0 <= number < count:
        raise UserError(
            f"--process-id is {number} of --num-processes {count}; processes are counted from 0 "
            "to one less than there are."
        )
    return given


def join(given: Processes) -> None:
    """Joins the other processes, if there are to be any; called before JAX starts. UserError where
    it is not known who they are."""
    if not given.distributed:
        return
    import jax

    wait_for_coordinator(given)
    count = "all" if given.num_processes is None else f"all {given.num_processes}"
    say(
        f"Waiting for {count} processes, for up to {given.initialization_timeout} seconds "
        "(--initialization-timeout)."
    )
    # It would take SIGTERM for itself; this program saves at one.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            given.coordinator_address, given.num_processes, given.process_id,
            initialization_timeout=given.initialization_timeout,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        if given.coordinator_address is not None:
            raise UserError(
                f"the processes cannot be joined at {given.coordinator_address} ({said}); name an "
                "address of process 0 that each can reach, and a port of it that is free."
            ) from error
        raise UserError(
            "--distributed finds no launcher (Slurm, Open MPI, Kubernetes) that tells of other "
            f"processes ({said}); give --coordinator-address HOST:PORT, --num-processes and "
            "--process-id."
        ) from error


def wait_for_coordinator(given: Processes) -> None:
    """UserError where process 0 cannot be reached within the timeout; JAX would abort this one."""
    if given.coordinator_address is None or given.process_id == 0:
        return
    host, _, port = given.coordinator_address.rpartition(":")
    deadline = time.monotonic() + given.initialization_timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 cannot be reached at --coordinator-address "
                    f"{given.coordinator_address} within {given.initialization_timeout} seconds "
                    f"({error.strerror or error}); start all processes with the same address."
                ) from error
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
    value = agreed(lambda: function() if first() else None)
    content = pickle.dumps(value) if first() else b""
    length = exchanged(len(content))[0]
    parts = [broadcast(content[at : at + CHUNK], length - at) for at in range(0, length, CHUNK)]
    return pickle.loads(b"".join(parts))


def broadcast(content: bytes, left: int) -> bytes:
    """Process 0's bytes, of which `left` are left to be sent, in every process."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    given = np.zeros(min(left, CHUNK), np.uint8)
    if first():
        given = np.frombuffer(content, np.uint8)
    return np.asarray(broadcast_one_to_all(given)).tobytes()


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


def check_same_flags(flags: dict[str, Any]) -> None:
    """UserError where another process was given other flags, by their names, than process 0."""
    check_equal(
        {f"--{name.replace('_', '-')}": value for name, value in flags.items()}, different_values
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
