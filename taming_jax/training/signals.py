"""What SIGINT and SIGTERM do to a run that trains: the first one saves after the current step."""

import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from taming_jax.errors import say

TWICE = 1  # seconds within which a second signal counts as the first, sent twice


class Signals:
    """Remembers the first SIGINT or SIGTERM after `listen`. A second one acts as it would without
    this class, unless it comes within a second of the first, as when a launcher signals both a
    process and its parent. Python allows handlers in the main thread only; in other threads
    nothing is caught.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = -math.inf
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Installs the handlers, unless they are installed already."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = signum, time.monotonic()
            say("\nStopping after this step, and saving; a second signal does neither.", sys.stderr)
        elif time.monotonic() - self._when > TWICE:
            self.restore()
            os.kill(os.getpid(), signum)

    def restore(self) -> None:
        """Installs the handlers that were there before."""
        while self._before:
            signal.signal(*self._before.popitem())
