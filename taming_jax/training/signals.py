"""Handling of SIGINT and SIGTERM: training saves a checkpoint after the current step and stops."""

import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from taming_jax.errors import say

DUPLICATE_SECONDS = 1  # a second signal within this time is a duplicate of the first


class Signals:
    """A handler that records the first SIGINT or SIGTERM after `listen`.

    A second signal has its usual effect, unless it arrives within a second of the first: a launcher
    may signal both a process and its parent. Python allows signal handlers in the main thread only;
    in other threads this class does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = -math.inf
        self._previous_handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Installs the handlers if they are not installed yet."""
        if threading.current_thread() is threading.main_thread() and not self._previous_handlers:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signum, time.monotonic()
            say(
                "\nStopping after this step and saving a checkpoint. Send the signal again to stop "
                "now without saving.",
                sys.stderr,
            )
        elif time.monotonic() - self._received_at > DUPLICATE_SECONDS:
            self.restore()
            os.kill(os.getpid(), signum)

    def restore(self) -> None:
        """Restores the previous handlers."""
        while self._previous_handlers:
            signal.signal(*self._previous_handlers.popitem())
