"""What SIGINT and SIGTERM do to a run: what is trained is saved first."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from taming_jax.errors import Interrupted, say
from taming_jax.parallel import distributed

TWICE = 1  # seconds within which a signal is the same one again


class Signals:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process as ever, unless it comes
    with the first, as where a launcher tells a process and its parent. Outside the main thread,
    where Python allows no handlers, nothing is caught.

    `own_process` says that a signal may end this process where there is nothing to save.
    """

    def __init__(self, own_process: bool = False) -> None:
        self.received: int | None = None
        self._own_process = own_process
        self._when = -math.inf
        self._at_once = self._ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While there is nothing to save: a signal raises Interrupted where it finds the run, with
        other processes where they hear of it."""
        hook = sys.unraisablehook

        def again(unraisable: Any) -> None:
            # Raised where Python lets nothing out, as in a call of its garbage collector: it comes
            # again when that, and this hook, is over.
            if isinstance(unraisable.exc_value, Interrupted):
                signum = unraisable.exc_value.signum
                threading.Timer(0.01, os.kill, (os.getpid(), signum)).start()
            else:
                hook(unraisable)

        self._at_once, sys.unraisablehook = True, again
        try:
            yield
        finally:
            self._at_once, sys.unraisablehook = False, hook

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """While nobody listens, as in a compilation, and there is nothing to save: a signal ends
        the process. A thread waits for it, since Python's handlers wait for what is called. Of
        several processes none may end so: the others would find it lost."""
        if not self._own_process or not self._before or distributed.count() > 1:
            yield
            return
        reading, writing = socket.socketpair()
        writing.setblocking(False)

        def end() -> None:
            while came := reading.recv(1):
                if came[0] in self._before:
                    say(f"\n{before_the_next_step(came[0])}", sys.stderr)
                    os._exit(128 + came[0])

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(writing.fileno())
        self._ending = True
        try:
            yield
        finally:
            self._ending = False
            signal.set_wakeup_fd(before)
            writing.close()
            thread.join()
            reading.close()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._at_once and distributed.may_raise():
            self.received, self._when = signum, time.monotonic()
            raise before_the_next_step(signum)
        if self.received is not None:
            if time.monotonic() - self._when > TWICE:
                self.__exit__()
                os.kill(os.getpid(), signum)
            return
        self.received, self._when = signum, time.monotonic()
        if not self._ending:
            say("\nStopping after this step, and saving; a second signal does neither.", sys.stderr)

    def check(self) -> None:
        """Interrupted, if a signal has come, to any of the processes, which all call this."""
        received = next(filter(None, distributed.exchanged(self.received)), None)
        if received is not None:
            raise before_the_next_step(received)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def before_the_next_step(signum: int) -> Interrupted:
    return Interrupted(
        signum,
        f"Stopped by {signal.Signals(signum).name} before the next step; the same command goes on "
        "from what is done.",
    )
