"""Errors that commands report to the user in one sentence, without a traceback.

`UserError` is an error that the user can fix, and `RunFailed` is a failure of the run itself.
`report`, which each command calls once, prints the message and returns the exit status.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(Exception):
    """An error that the user can fix; the message says how. Exit status 2."""


class RunFailed(Exception):
    """A failure that ends the run, such as non-finite values. Exit status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal that stopped training after a checkpoint. Exit status 128 + signal number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def say(sentence: str, file: TextIO | None = None) -> None:
    """Prints a sentence and flushes it. Ignores OSError, so that a full disk or a closed pipe does
    not stop the run."""
    with contextlib.suppress(OSError):
        print(sentence, file=file, flush=True)


def report(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit status. Prints one sentence on stderr if it fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # so that an ASCII terminal shows every message
            stream.reconfigure(errors="backslashreplace")
    # SIGINT ends commands at once, without a traceback. Training handles it (training/signals.py).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = 0
    try:
        command()
    except UserError as error:
        status = 2
        say(f"error: {error}", sys.stderr)
    except RunFailed as error:
        status = 1
        say(f"failed: {error}", sys.stderr)
    except Interrupted as signal_error:
        status = 128 + signal_error.signum
        say(f"\n{signal_error}", sys.stderr)
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has exited
        status = 0
    for stream in (sys.stdout, sys.stderr):
        flush_or_discard(stream)
    return status


def flush_or_discard(stream: TextIO) -> None:
    """Flushes a stream, and discards output that cannot be written, so that Python does not exit
    with status 120."""
    try:
        stream.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
