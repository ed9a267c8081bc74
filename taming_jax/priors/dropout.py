"""Dropout whose random numbers are a hash of the example's key, the layer, and the position.

The mask of an example does not depend on the rest of the batch or on the device. A random number
costs about a dozen integer operations, which XLA fuses with the layer. JAX's own generator,
Threefry, needs about a hundred.
"""

import math

import jax
import jax.numpy as jnp


def mix(x: jax.Array) -> jax.Array:
    """Hashes integers uint32 [...]: every bit of the input changes about half of the bits of the
    result. The constants are those of lowbias32 (github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def random_bits(keys: jax.Array, layer: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns random integers uint32 [b, *shape] from one key per example, uint32 [b,2]."""
    # Both words depend on the layer. The second hash separates examples and layers even if the
    # ranges of `positions + first` overlap, which is common.
    first = mix(keys[:, 0] + jnp.uint32(layer * 0x9E3779B9 % 2**32))
    second = mix(keys[:, 1] ^ first)
    first, second = (word.reshape(-1, *[1] * len(shape)) for word in (first, second))
    positions = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return mix(mix(positions + first) + second)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, layer: int) -> jax.Array:
    """Sets each element of x [b, ...] to zero with probability `rate`, and scales the others so
    that their mean stays the same. `keys` uint32 [b,2] is None outside training. `layer` is
    the number of the layer within the network."""
    if keys is None or not rate:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    is_kept = random_bits(keys, layer, x.shape[1:]) >= jnp.uint32(int(rate * 2**32))
    # In float32, since rounding 1 - rate to bfloat16 would change the mean by up to 0.2%.
    return jnp.where(is_kept, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)
