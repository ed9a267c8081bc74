"""Gradient accumulation: a batch is taken in parts, one after the other, so that only one part's
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
    """How often the body of `mean_over_parts` runs for each time that it is compiled."""
    return 1 if unrolled() else count


def mean_over_parts(function: Callable[[Any], Any], arrays: Any, count: int) -> Any:
    """The mean of what a function returns for each of `count` parts of arrays [b, ...]."""
    if count == 1:
        return function(arrays)
    parts = divided(arrays, count)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def body(total: Any, number: jax.Array) -> tuple[Any, None]:
        # A part waits for the one before, whose sums its index seems to need: side by side they
        # would take the whole batch's memory (XLA's CPU compiler drops optimization_barrier before
        # it puts operations in order). Where something is not a number, the step is lost anyway.
        ends = jnp.stack([leaf.ravel()[-1] for leaf in jax.tree.leaves(total)])
        number += jnp.isnan(ends).any()
        part = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), parts)
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = lax.scan(body, zeros, jnp.arange(count), unroll=unrolled())
    return jax.tree.map(lambda x: x / count, total)
