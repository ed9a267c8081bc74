"""The failures that a person, not a programmer, has to read.

`UserError` is what the user can mend, `RunFailed` what went wrong in the run itself. Both carry one
whole sentence. `report` turns them into that sentence on stderr and an exit status, and is called
once a command.
"""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """The user can mend this: the message names the thing and says what to do. Exit status 2."""


class RunFailed(Exception):
    """The run cannot go on (not finite, nothing could be saved). Exit status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after its state was saved. Exit status 128 + the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum

    def __reduce__(self) -> tuple:
        return Interrupted, (self.signum, str(self))


def report(command: Callable[[], object]) -> int:
    """Runs a command and answers its exit status, with one sentence on stderr where it failed."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
