"""Sampling of codes from logits, and the random keys for it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A function that chooses codes int32 [b] from logits [b,n] at a position.
TokenSampler = Callable[[jax.Array, jax.Array], jax.Array]
# The inputs of the scans over positions: the positions [t], their guidance scales [t] or None, and
# the known codes [t,b], where -1 marks a code to sample.
Inputs = tuple[jax.Array, jax.Array | None, jax.Array]


def sampling_batch_size(device: Any) -> int:
    """Returns the number of images that a device samples at once.

    The number is fixed per kind of device, because another batch size rounds differently, and a
    rounding difference can change a code. It is small on a CPU, so that sampling a single image
    does not take as long as sampling many.
    """
    return 8 if device.platform == "cpu" else 32


def sample_keys(
    seed: jax.Array | np.uint32, labels: jax.Array | np.ndarray, numbers: jax.Array | np.ndarray
) -> jax.Array:
    """Returns the random keys [b] for sampling images with labels int [b] and numbers int [b]. The
    seed, the label, and the number of an image within its class determine the image."""
    key = jax.random.key(seed)
    return jax.vmap(lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i))(labels, numbers)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the k largest of the logits [..., n] to -inf."""
    smallest = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Sets the logits [..., n] outside the nucleus to -inf. The nucleus is the smallest set of
    tokens with a total probability of at least p (arXiv 1904.09751). It is never empty."""
    descending = -jnp.sort(-logits, -1)
    probabilities = jax.nn.softmax(descending)
    preceding = jnp.cumsum(probabilities, -1) - probabilities
    in_nucleus = preceding < jnp.maximum(p, 1e-9)
    smallest = jnp.where(in_nucleus, descending, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def guide_logits(
    conditional: jax.Array, unconditional: jax.Array, scale: jax.Array | float
) -> jax.Array:
    """Applies classifier-free guidance (arXiv 2207.12598) to logits. A scale of 0 returns the
    unconditional logits, 1 the conditional ones; a larger scale extrapolates."""
    return unconditional + scale * (conditional - unconditional)


def append_unconditional(model: Any, labels: jax.Array, scale: Any) -> jax.Array:
    """Returns the labels [b] if the scale is None, and otherwise [2b]: the labels, followed by b
    labels that mean no class."""
    if scale is None:
        return labels
    return jnp.concatenate([labels, jnp.full_like(labels, model.classes)])


def apply_guidance(logits: jax.Array, scale: jax.Array | float | None) -> jax.Array:
    """Returns the logits [b,n] unchanged if the scale is None. Otherwise, combines logits [2b,n],
    the first half conditional and the second unconditional, into guided logits [b,n]."""
    if scale is None:
        return logits
    conditional, unconditional = jnp.split(logits, 2)
    return guide_logits(conditional, unconditional, scale)


def make_token_sampler(
    keys: jax.Array,
    temperature: jax.Array | float,
    top_k: int | None,
    top_p: jax.Array | float | None,
) -> TokenSampler:
    """Returns a function that samples the codes of a position from their logits.

    It uses one key per image [b], so that the codes of an image do not depend on the rest of the
    batch. At temperature 0, it chooses the most likely codes.
    """

    def choose(logits: jax.Array, position: jax.Array) -> jax.Array:
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        scaled = logits / jnp.maximum(temperature, 1e-6)
        if top_p is not None:
            scaled = keep_top_p(scaled, top_p)
        sampled = jax.vmap(lambda k, x: jax.random.categorical(jax.random.fold_in(k, position), x))(
            keys, scaled
        )
        return jnp.where(temperature == 0, logits.argmax(-1), sampled).astype(jnp.int32)

    return choose
