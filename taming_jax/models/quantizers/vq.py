"""The quantizer of VQ-VAE, and the base class of quantizers that choose the nearest code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.config.quantizers import VQConfig
from taming_jax.models.quantizers.interface import (
    Quantized,
    Quantizer,
    Training,
    l2_normalize,
    mean_square,
    straight_through,
)


def find_nearest(z: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the indices int32 [b,h,w] of the codes [k,d] that are nearest to latents [b,h,w,d],
    both float32."""
    # |z|^2 is omitted from |z - e|^2 because it is the same for every code. A product in TF32
    # could choose another code if two codes are almost equally near.
    scores = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(codes).sum(-1) - 2 * scores, -1).astype(jnp.int32)


class VectorQuantizer(Quantizer):
    """The quantizer of VQ-VAE (arXiv 1711.00937, equation 3), in float32.

    loss = |sg(z) - e|^2 + commitment * |z - sg(e)|^2, averaged over the d dimensions;
    `legacy_commitment` puts the weight on the other term, as the official code does by default.
    `l2_normalise` first scales the latents and the codes to unit length (arXiv 2110.04627, section
    3.2)."""

    @property
    def options(self) -> VQConfig:
        return self.settings.vq

    def setup(self) -> None:
        k, d = self.num_codes, self.code_dim
        # The directions of normally distributed codes are uniformly distributed. Without
        # normalization, the codes start small, as in the official code.
        init = nn.initializers.normal(1.0) if self.options.l2_normalise else uniform(1 / k)
        self.codebook = self.param("codebook", init, (k, d))

    def normalize(self, x: jax.Array) -> jax.Array:
        """Scales vectors [...,d] to unit length if the settings say so."""
        return l2_normalize(x) if self.options.l2_normalise else x

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        z, codes = self.normalize(z.astype(jnp.float32)), self.normalize(self.codebook)
        indices = find_nearest(z, codes)
        vectors = codes[indices]
        codebook_loss = mean_square(vectors, lax.stop_gradient(z))
        commitment_loss = mean_square(lax.stop_gradient(vectors), z)
        if self.options.legacy_commitment:
            loss = commitment_loss + self.options.commitment * codebook_loss
        else:
            loss = codebook_loss + self.options.commitment * commitment_loss
        return Quantized(straight_through(z, vectors), indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        return self.normalize(self.codebook)[indices]


def uniform(bound: float) -> nn.initializers.Initializer:
    """Returns an initializer that draws uniformly from [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
