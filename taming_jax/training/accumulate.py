"""Gradient accumulation: a batch is processed as a sequence of micro-batches, so that memory holds
the activations of only one micro-batch at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def split_batch(tree: Any, count: int) -> Any:
    """Splits arrays [b, ...] into `count` micro-batches, [count, b / count, ...].

    Example i of a device goes to micro-batch i % count. Each device has the same number of
    examples, which is a multiple of `count`, so a micro-batch holds the same examples of the global
    batch on any number of devices."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


def should_unroll() -> bool:
    """Returns whether to unroll the loop over micro-batches. On a CPU, a convolution's gradient is
    twenty times slower inside a loop."""
    return jax.default_backend() == "cpu"


def count_loop_iterations(count: int) -> int:
    """Returns how often each compiled copy of the loop body of `average_micro_batches` runs in a
    step. `Compiled.flops` counts each copy once."""
    return 1 if should_unroll() else count


def average_micro_batches(function: Callable[[Any], Any], arrays: Any, count: int) -> Any:
    """Splits arrays [b, ...] into `count` micro-batches and returns the mean of the function's
    results over them."""
    if count == 1:
        return function(arrays)
    micro_batches = split_batch(arrays, count)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def body(total: Any, index: jax.Array) -> tuple[Any, None]:
        # Make the index depend on the previous sums, so that XLA cannot run micro-batches in
        # parallel, which would need the memory of the full batch. optimization_barrier does not
        # help: XLA's CPU compiler drops it before it schedules operations. A NaN changes the index,
        # but such a step is skipped anyway.
        last_values = jnp.stack([leaf.ravel()[-1] for leaf in jax.tree.leaves(total)])
        index += jnp.isnan(last_values).any()
        micro_batch = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), micro_batches
        )
        return jax.tree.map(jnp.add, total, function(micro_batch)), None

    total, _ = lax.scan(body, zeros, jnp.arange(count), unroll=should_unroll())
    return jax.tree.map(lambda x: x / count, total)
