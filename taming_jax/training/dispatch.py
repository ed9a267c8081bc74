"""How many steps a device takes per call from Python.

Starting a program takes a GPU's host about as long as a GPU takes for a step of a small model. One
program that takes several steps keeps the GPU busy.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from taming_jax.parallel import distributed
from taming_jax.training.cadences import Cadences

DISPATCH_SECONDS = 0.02  # the duration of a dispatch that `choose_size` aims at
MAX_SIZE = 32  # more steps would delay the reaction to a signal, and save little
MEASURED_STEPS = range(4, 14)  # of a call to `train`, in which the first steps may still compile


def scan_steps(step: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
    """Returns a function like `step` that takes n steps: `index` and `place` are [n,b] instead of
    [b], all other arrays are the same in every step, and the metrics are [n,m].

    A step must compute the same bits inside a loop. Steps with convolutions do not on a CPU.
    """

    def steps(state: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        rows = {name: arrays[name] for name in ("index", "place")}
        return lax.scan(lambda state, row: step(state, arrays | row), state, rows)

    return steps


def choose_size(seconds: float, log_every: int) -> int:
    """Returns the number of steps per dispatch for steps of `seconds` each: as many as fit into
    `DISPATCH_SECONDS`, at most `MAX_SIZE`, and a divisor of `log_every`, since a row of the log
    needs the steps before it."""
    limit = min(max(int(DISPATCH_SECONDS / seconds), 1), MAX_SIZE)
    return max(n for n in range(1, limit + 1) if log_every % n == 0)


class Dispatcher:
    """Decides how many steps to take at once.

    `size` is the number of steps per dispatch, or None to measure the steps and choose it. No
    dispatch crosses a step at which one of the `cadences` is due, or one of the steps `stops`.
    """

    def __init__(self, size: int | None, cadences: Cadences, stops: Sequence[int]):
        self._measuring, self._size, self._log_every = size is None, size or 1, cadences.log
        periods = (cadences.validate, cadences.distance, cadences.save, cadences.log)
        self._periods, self._stops = [n for n in periods if n], stops
        self._steps, self._start = 0, 0.0

    def count(self, done: int) -> int:
        """Returns how many steps to take after `done` steps: the number of steps per dispatch, or 1
        if something is due before them. Two programs suffice for this."""
        due = [(done // n + 1) * n for n in self._periods] + [n for n in self._stops if n > done]
        return self._size if min(due) - done >= self._size else 1

    def observe(self, results: Any) -> None:
        """Measures a single step, given its results, and chooses the number of steps per dispatch
        after the last measurement."""
        if not self._measuring:
            return
        self._steps += 1
        if self._steps in (MEASURED_STEPS.start, MEASURED_STEPS.stop):
            jax.block_until_ready(results)
            start, self._start = self._start, time.perf_counter()
        if self._steps == MEASURED_STEPS.stop:
            seconds = (self._start - start) / len(MEASURED_STEPS)
            # All processes must take the same number of steps.
            self._size = distributed.run_on_primary(lambda: choose_size(seconds, self._log_every))
            self._measuring = False
