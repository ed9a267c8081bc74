"""The failures that a person, not a programmer, has to read.

`UserError` is what the user can mend, `RunFailed` what went wrong in the run itself. Both carry one
whole sentence. `report` turns them into that sentence on stderr and an exit status, and is called
once a command.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(Exception):
    """The user can mend this: the message names the thing and says what to do. Exit status 2."""


class RunFailed(Exception):
    """The run cannot go on (not finite, nothing could be saved). Exit status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after its state was saved. Exit status 128 + the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def say(sentence: str, file: TextIO | None = None) -> None:
    """Prints a sentence at once. Where it goes to a file on a full disk it is lost, or comes when
    there is room; the run is not."""
    with contextlib.suppress(OSError):
        print(sentence, file=file, flush=True)


def report(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit status, with one sentence on stderr where it failed."""
    # SIGINT ends a command at once and without a traceback, but for training (training/signals.py).
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
    except Interrupted as stop:
        status = 128 + stop.signum
        say(f"\n{stop}", sys.stderr)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has what it wanted
        status = 0
    for stream in (sys.stdout, sys.stderr):
        settle(stream)
    return status


def settle(stream: TextIO) -> None:
    """Drops what a stream's file does not take, over which Python would end with status 120."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
