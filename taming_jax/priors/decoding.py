"""How priors choose codes from logits, and the random keys by which they draw them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Logits [b,n] and a position to codes int32 [b].
Choose = Callable[[jax.Array, jax.Array], jax.Array]
# What the scans over positions read: the positions [t], their guidance scales [t] or None, and
# known codes [t,b], -1 where one is to be drawn.
Inputs = tuple[jax.Array, jax.Array | None, jax.Array]


def micro_batch(device: Any) -> int:
    """How many images a device draws at once. The number is fixed for a kind of device, because
    another one rounds otherwise, and a rounding can turn a code. A CPU draws few, so that a single
    image does not take the time of many."""
    return 8 if device.platform == "cpu" else 32


def sample_keys(
    seed: jax.Array | np.uint32, labels: jax.Array | np.ndarray, numbers: jax.Array | np.ndarray
) -> jax.Array:
    """The random keys [b] of images of classes int [b]: a seed, a class and the image's number
    within it determine the image."""
    key = jax.random.key(seed)
    return jax.vmap(lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i))(labels, numbers)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Logits [..., n] with all but the k largest at -inf."""
    smallest = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Logits [..., n] with all but the nucleus at -inf: the fewest that hold a share p of the
    probability (arXiv 1904.09751). At least the largest is kept."""
    ordered = -jnp.sort(-logits, -1)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, -1) - probabilities
    smallest = jnp.where(before < jnp.maximum(p, 1e-9), ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def guided(conditional: jax.Array, unconditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598) of logits: a scale of 0 returns the unconditional
    ones, 1 the conditional, more goes beyond."""
    return unconditional + scale * (conditional - unconditional)


def with_unconditional(model: Any, labels: jax.Array, scale: Any) -> jax.Array:
    """Labels [b], followed for guidance by as many of no class."""
    if scale is None:
        return labels
    return jnp.concatenate([labels, jnp.full_like(labels, model.classes)])


def apply_guidance(logits: jax.Array, scale: jax.Array | float | None) -> jax.Array:
    """With a guidance scale, of logits [2b,n], the conditional ones and then the unconditional
    ones: [b,n]."""
    if scale is None:
        return logits
    conditional, unconditional = jnp.split(logits, 2)
    return guided(conditional, unconditional, scale)


def token_choice(
    keys: jax.Array,
    temperature: jax.Array | float,
    top_k: int | None,
    top_p: jax.Array | float | None,
) -> Choose:
    """A function that draws the codes of a position from their logits, with one key [b] per image:
    an image's codes do not depend on the others in the batch. A `temperature` of 0 takes the most
    likely codes."""

    def choose(logits: jax.Array, position: jax.Array) -> jax.Array:
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        scaled = logits / jnp.maximum(temperature, 1e-6)
        if top_p is not None:
            scaled = keep_top_p(scaled, top_p)
        drawn = jax.vmap(lambda k, x: jax.random.categorical(jax.random.fold_in(k, position), x))(
            keys, scaled
        )
        return jnp.where(temperature == 0, logits.argmax(-1), drawn).astype(jnp.int32)

    return choose
