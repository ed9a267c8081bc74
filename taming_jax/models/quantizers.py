"""Quantizers: from latents to the nearest entries of a codebook, and back from indices.

All share one call signature: `quantizer(z) -> Quantized`, and `quantizer.lookup(indices)`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Quantized(NamedTuple):
    """What a quantizer makes of latents z [b,h,w,d].

    vectors: the codes in place of z, float32 [b,h,w,d], with the gradient going straight to z.
    indices: int32 [b,h,w], raster order.
    loss: codebook and commitment term of each place, float32 [b,h,w].
    """

    vectors: jax.Array
    indices: jax.Array
    loss: jax.Array


class VectorQuantizer(nn.Module):
    """VQ-VAE's quantizer (arXiv 1711.00937, equation 3) in float32.

    loss = |sg(z) - e|^2 + commitment * |z - sg(e)|^2, averaged over the d dimensions; `legacy`
    puts the weight on the other term, as the official code did at first. With `l2_normalise` the
    latents and the codes are scaled to length one first (arXiv 2110.04627, section 3.2).
    """

    codebook_size: int
    code_dim: int
    commitment: float = 0.25
    legacy: bool = False
    l2_normalise: bool = False

    def setup(self) -> None:
        k, d = self.codebook_size, self.code_dim
        # Directions are spread evenly; plain codes start small, as in the official code.
        init = nn.initializers.normal(1.0) if self.l2_normalise else uniform(1 / k)
        self.codebook = self.param("codebook", init, (k, d))

    def __call__(self, z: jax.Array) -> Quantized:
        z = z.astype(jnp.float32)
        codes = self.codebook
        if self.l2_normalise:
            z, codes = unit(z), unit(codes)
        # |z - e|^2 without |z|^2, which is the same for every code. `highest`: a TF32 product
        # would choose another code where two are almost as near.
        scores = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
        indices = jnp.argmin(jnp.square(codes).sum(-1) - 2 * scores, -1).astype(jnp.int32)
        vectors = select(codes, indices)
        on_codes = jnp.square(vectors - lax.stop_gradient(z)).mean(-1)
        on_latents = jnp.square(lax.stop_gradient(vectors) - z).mean(-1)
        if self.legacy:
            loss = on_latents + self.commitment * on_codes
        else:
            loss = on_codes + self.commitment * on_latents
        return Quantized(z + lax.stop_gradient(vectors - z), indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """The codes at indices int32 [b,h,w], float32 [b,h,w,d]."""
        codes = unit(self.codebook) if self.l2_normalise else self.codebook
        return codes[indices]


def select(codes: jax.Array, indices: jax.Array) -> jax.Array:
    """`codes[indices]` as a one-hot product, which is exact and whose gradient is a product too: a
    gather's gradient is a scatter-add, hundreds of times slower on some GPUs."""
    one_hot = jax.nn.one_hot(indices, codes.shape[0], dtype=codes.dtype)
    return jnp.matmul(one_hot, codes, precision=lax.Precision.HIGHEST)


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., d] scaled to length one; the small constant keeps a zero's gradient finite."""
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
