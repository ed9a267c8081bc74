"""A batch taken in parts, one after the other: what each finds is added up, and only one part's
activations need memory at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def divided(tree: Any, count: int) -> Any:
    """Arrays [b, ...] in so many parts, [count, b / count, ...]. Example i of a device belongs to
    part i % count: since each device has the same number of examples, a multiple of `count`, a part
    holds the same examples of the whole batch on any number of devices."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


def unrolled() -> bool:
    """Whether the parts are compiled one by one: on a CPU a convolution's gradient is twenty times
    slower in a loop."""
    return jax.default_backend() == "cpu"


def repeated(count: int) -> int:
    """How often what `accumulated` does to a part is repeated for what is compiled of it."""
    return 1 if unrolled() else count


def accumulated(
    part: Callable[[Any, Any], tuple[Any, Any]], carry: Any, arrays: Any, count: int
) -> tuple[Any, Any]:
    """Calls `part(carry, arrays) -> (carry, found)` on each of so many parts of arrays [b, ...],
    and answers the last carry and the sum of what was found."""
    if count == 1:
        return part(carry, arrays)
    parts = divided(arrays, count)
    shapes = jax.eval_shape(part, carry, jax.tree.map(lambda x: x[0], parts))[1]
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def body(state: tuple[Any, Any], number: jax.Array) -> tuple[Any, None]:
        carry, total = state
        # A part waits for the one before, whose sums its index seems to need: side by side they
        # would take the whole batch's memory (XLA's CPU compiler drops optimization_barrier before
        # it puts operations in order). Where something is not a number, the step is lost anyway.
        ends = jnp.stack([leaf.ravel()[-1] for leaf in jax.tree.leaves(total)])
        number += jnp.isnan(ends).any()
        arrays = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), parts)
        carry, found = part(carry, arrays)
        return (carry, jax.tree.map(jnp.add, total, found)), None

    return lax.scan(body, (carry, nothing), jnp.arange(count), unroll=unrolled())[0]
