"""Sampling of codes from logits, and the random keys for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A function that chooses codes int32 [b] or [b,t] from logits [b,n] or [b,t,n], and from the number
# of the position or pass.
TokenSampler = Callable[[jax.Array, jax.Array], jax.Array]
# The inputs of the scans over positions: the positions [t], their guidance scales [t] or None, and
# the known codes [t,b], where -1 marks a code to sample.
Inputs = tuple[jax.Array, jax.Array | None, jax.Array]


class Samples(NamedTuple):
    """Sampled grids: their codes int32 [b,h,w], and the pass that drew each code, int32 [b,h,w],
    which is its place in raster order unless several codes are drawn at once, and -1 for known
    codes."""

    codes: jax.Array
    passes: jax.Array


MAX_LOGITS = 2**28  # of a micro-batch, 1 GiB in float32; guidance and sampling need copies


def sampling_batch_size(device: Any, logits_per_image: int) -> int:
    """Returns the number of images that a device samples at once with a prior that computes so many
    logits per image at once.

    The number is fixed per kind of device and prior, because another batch size rounds differently,
    and a rounding difference can change a code. It is small on a CPU, so that sampling a single
    image does not take as long as sampling many. A GPU takes about as long for a large micro-batch
    as for a small one.
    """
    return min(8 if device.platform == "cpu" else 256, max(1, MAX_LOGITS // logits_per_image))


def sampling_pieces(device: Any, length: int) -> int:
    """Returns the number of scans into which the positions of a sequence are divided. The cache
    grows from scan to scan, so that early positions do not read all of it. A GPU saves little by
    that, but has to compile every scan."""
    return min(-(-length // 32), 8 if device.platform == "cpu" else 4)


def sample_keys(
    seed: jax.Array | np.uint32, labels: jax.Array | np.ndarray, numbers: jax.Array | np.ndarray
) -> jax.Array:
    """Returns the random keys [b] for sampling images with labels int [b] and numbers int [b]. The
    seed, the label, and the number of an image within its class determine the image."""
    key = jax.random.key(seed)
    return jax.vmap(lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i))(labels, numbers)


def exclude_unlikely(
    logits: jax.Array,
    temperature: jax.Array | float,
    top_k: int | None,
    top_p: jax.Array | float | None,
) -> jax.Array:
    """Sets the logits [..., n] to -inf, except the `top_k` largest and, of these, the nucleus: the
    smallest set of tokens with a total probability of at least `top_p` at the temperature (arXiv
    1904.09751), which is never empty. Logits that equal the smallest kept one are kept as well."""
    if top_k is None and top_p is None:
        return logits
    descending = -jnp.sort(-logits, -1) if top_k is None else lax.top_k(logits, top_k)[0]
    smallest = descending[..., -1:]
    if top_p is not None:
        probabilities = jax.nn.softmax(descending / temperature)
        preceding = jnp.cumsum(probabilities, -1) - probabilities
        in_nucleus = preceding < jnp.maximum(top_p, 1e-9)
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
    """Returns the logits [b,...] unchanged if the scale is None. Otherwise, combines logits
    [2b,...], the first half conditional and the second unconditional, into guided logits [b,...].
    """
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
    """Returns a function that samples codes from their logits.

    It uses one key per image [b], so that the codes of an image do not depend on the rest of the
    batch. At temperature 0, it chooses the most likely codes.
    """

    def choose(logits: jax.Array, position: jax.Array) -> jax.Array:
        divisor = jnp.maximum(temperature, 1e-6)
        scaled = exclude_unlikely(logits, divisor, top_k, top_p) / divisor
        sampled = jax.vmap(lambda k, x: jax.random.categorical(jax.random.fold_in(k, position), x))(
            keys, scaled
        )
        return jnp.where(temperature == 0, logits.argmax(-1), sampled).astype(jnp.int32)

    return choose
