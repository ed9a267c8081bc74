"""Several training steps with one call from Python.

For a small model, starting a step takes the host about as long as the step takes a GPU. A program
that takes several steps keeps the GPU busy.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jax import lax

from taming_jax.config.schema import PriorConfig
from taming_jax.errors import UserError
from taming_jax.training.cadences import Cadences


def scan_steps(step: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
    """Returns a function like `step` that takes n steps: `index` and `place` are [n,b] instead of
    [b], all other arrays are the same in every step, and the metrics are [n,m].

    A step must compute the same bits inside a loop. Steps with convolutions do not on a CPU.
    """

    def steps(state: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        rows = {name: arrays[name] for name in ("index", "place")}
        return lax.scan(lambda state, row: step(state, arrays | row), state, rows)

    return steps


def check_dispatch(settings: PriorConfig, examples: int) -> None:
    """Raises UserError if no call can take all steps of a dispatch, because a line of the log is
    due before, in a run on `examples` training images."""
    size, log_every = settings.steps_per_dispatch, Cadences.choose(settings, examples).log
    if size > log_every:
        raise UserError(
            f"--prior.steps-per-dispatch is {size}, but a line of the log is due every "
            f"{log_every} steps; set --prior.log-every to a multiple of {size}."
        )


def count_steps(done: int, size: int, periods: Iterable[int], stops: Iterable[int]) -> int:
    """Returns how many steps to take with one call after `done` steps: `size`, or 1 if a multiple
    of one of the `periods` or one of the steps `stops` comes before. Only two programs are needed,
    one for each number."""
    due = [(done // n + 1) * n for n in periods] + [n for n in stops if n > done]
    return size if min(due) - done >= size else 1
