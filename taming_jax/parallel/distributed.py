"""Several processes as one run, by jax.distributed: how they begin, agree on things, and end.

Where JAX finds another process gone it ends its own from C++, with a stack trace. `watched`
therefore runs a command in a process of its own, and its parent says in a sentence what happened.
Everything else here does nothing where there is one process only.
"""

import dataclasses
import importlib.metadata
import multiprocessing
import os
import pickle
import platform
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from taming_jax import progress
from taming_jax.config.load import differences, show
from taming_jax.config.schema import OF_A_MACHINE, Config
from taming_jax.config.validation import flag
from taming_jax.errors import Interrupted, RunFailed, UserError, report

HEARTBEAT = 60  # seconds of silence after which a process counts as gone
CHUNK = 2**26  # bytes sent at once

# What a process that works tells its parent, before it has a status to tell.
BEGINNING, JOINED = -2, -1

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
    """The same, where it can be; UserError where not."""
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


def watched(work: Callable[[], object], given: Processes) -> None:
    """Runs `work`, which pickles, here; or with other processes, in a child that joins them. Then
    the end of that is this process's: its status, or a sentence where it was ended by a signal, as
    JAX does where another process is lost or the coordinator does not answer."""
    if not given.distributed:
        # Until the work listens itself. Python's own KeyboardInterrupt may be raised where nothing
        # is let out, as in a call of its garbage collector, and is lost then.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work()
        return
    context = multiprocessing.get_context("spawn")
    phase = context.RawValue("i", BEGINNING)
    with tempfile.NamedTemporaryFile(prefix="taming_jax-", suffix=".log", delete=False) as said:
        child = context.Process(target=_work, args=(work, given, phase, said.name))

    def pass_on(signum: int, frame: FrameType | None = None) -> None:
        received.append(signum)
        if child.pid is not None:
            # Before it has joined there is nothing to save, and JAX does not hear of SIGINT.
            os.kill(child.pid, signal.SIGTERM if phase.value == BEGINNING else signum)

    received: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, pass_on)
    # The child inherits that, until it has left the terminal, whose Ctrl-C else comes twice.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if received:  # before it had a number
        pass_on(received[-1])
    child.join()
    code = child.exitcode or 0
    if code < 0 and phase.value >= 0:  # it had ended in good order, and JAX had not
        code = phase.value
    if code >= 0:
        Path(said.name).unlink(missing_ok=True)
        sys.exit(code)
    if received and -code in (signal.SIGINT, signal.SIGTERM):
        Path(said.name).unlink(missing_ok=True)
        when = "before anything was begun" if phase.value == BEGINNING else "at once, unsaved"
        raise Interrupted(received[-1], f"Stopped {when}.")
    if phase.value == BEGINNING:
        raise UserError(
            f"the {given.num_processes or ''} processes did not find each other within "
            f"{given.initialization_timeout} seconds (--initialization-timeout): the coordinator, "
            f"process 0 at {given.coordinator_address or 'the address that the launcher gave'}, "
            "did not answer or found its port in use, or some did not come. Start all of them, "
            "with the same address, which each must be able to reach; JAX's own words are in "
            f"{said.name}."
        )
    if -code == signal.SIGABRT:
        raise RunFailed(f"{LOST}; JAX's own words are in {said.name}.")
    raise RunFailed(
        f"the process that computes was ended by {signal.Signals(-code).name}, for want of memory "
        "perhaps; the same command, for every process, goes on from the last checkpoint."
    )


LOST = (
    "another process of this run, or its coordinator, was lost; the same command, for every "
    "process, goes on from the last checkpoint"
)


def end_with_parent() -> None:
    """Ends a process whose parent was killed, and which would else wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(work: Callable[[], object], given: Processes, phase: Any, noise: str) -> None:
    """What the child does. What C++ writes goes to the file `noise`, what Python says to where it
    was said before."""
    os.setsid()  # so that a terminal's Ctrl-C comes once, by way of the parent
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with open(noise, "ab") as file:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            number = stream.fileno()
            kept = open(os.dup(number), "w", buffering=1, errors="replace")  # noqa: SIM115
            setattr(sys, name, kept)
            os.dup2(file.fileno(), number)
    threading.Thread(target=end_with_parent, daemon=True).start()
    lost = []

    def joined() -> None:
        import jax

        join(given)
        phase.value = JOINED
        try:
            work()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if not torn(error):
                raise
            os.write(2, traceback.format_exc().encode())
            lost.append(error)
            raise RunFailed(f"{LOST}; JAX's own words are in {noise}.") from error

    status = report(joined)
    phase.value = status
    sys.stdout.flush()
    sys.stderr.flush()
    if not lost and phase.value != BEGINNING:
        import jax

        jax.distributed.shutdown()  # which waits for the others, who have things to say
    os._exit(status)


def torn(error: Exception) -> bool:
    """Whether an error says that another process is gone: one of JAX's, or where it meets the
    closed connection as a step is begun a ValueError, that speaks of how they are connected."""
    words = r"gloo|nccl|coordination|heartbeat|barrier|connect|socket|\bpeer\b|unavailable|deadline"
    return re.search(words, str(error), re.IGNORECASE) is not None


def join(given: Processes) -> None:
    """Starts jax.distributed. UserError where it does not know who the others are."""
    import jax

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


_agreeing = False


def may_raise() -> bool:
    """Whether a signal's handler may raise here: with other processes only where `agreed` tells
    them of it."""
    return _agreeing or count() == 1


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
    """What a function answers; where it fails in one process, all fail. It must not itself need
    the other processes."""
    global _agreeing
    error: BaseException | None = None
    try:
        try:
            _agreeing = True
            value = function()
        finally:
            _agreeing = False
    except (UserError, RunFailed, Interrupted) as raised:
        error = raised
    errors = exchanged(error)
    if error is not None:
        raise error
    for process, other in enumerate(errors):
        if isinstance(other, Interrupted):
            raise other
        if other is not None:
            raise type(other)(f"process {process}: {other}")
    return value


def from_first(function: Callable[[], T]) -> T:
    """What a function answers in process 0, which alone runs it, in every process; or what it
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


# Where a run's files lie may differ from machine to machine.
PLACES = {"--workdir", *(flag("data", name) for name in OF_A_MACHINE)}
PACKAGES = ("taming_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def installed_version(package: str) -> str:
    """A package's version; that of a checkout on the path is not known."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_alike(config: Config) -> None:
    """UserError where another process has other settings or other packages than process 0."""
    if count() == 1:
        return
    versions = {name: installed_version(name) for name in PACKAGES}
    versions["Python"] = platform.python_version()
    sections = [field.name for field in dataclasses.fields(Config)]
    every = exchanged((config, versions))
    config0, versions0 = every[0]
    for process, (other, packages) in enumerate(every):
        found = [
            phrase
            for phrase in differences(other, config0, sections, also_free=True)
            if phrase.split(" ")[0] not in PLACES
        ]
        found += [
            f"{name} is {packages[name]}, not {versions0[name]}"
            for name in versions0
            if packages[name] != versions0[name]
        ]
        if found:
            raise UserError(
                f"process {process} differs from process 0: {'; '.join(found)}. Start all "
                "processes with the same settings and the same packages."
            )


def check_same_flags(flags: dict[str, Any]) -> None:
    """UserError where another process was given other flags than process 0."""
    every = exchanged(flags)
    for process, other in enumerate(every):
        found = [
            f"{flag(name)} is {show(other[name])}, not {show(every[0][name])}"
            for name in flags
            if other[name] != every[0][name]
        ]
        if found:
            raise UserError(
                f"process {process} differs from process 0: {'; '.join(found)}. Start all "
                "processes with the same settings."
            )


def check_same_data(dataset: Any, compare: Callable[[Any, Any], list[str]]) -> None:
    """UserError where another process reads other data than process 0, `compare` returning how two
    datasets differ, one phrase for each difference."""
    every = exchanged(dataset)
    for process, other in enumerate(every):
        found = compare(other, every[0])
        if found:
            raise UserError(
                f"process {process} reads other data than process 0: {'; '.join(found)}. Give all "
                "the same, by --data.path."
            )
