"""Finite scalar quantization."""

import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.models.quantizers.interface import Quantized, Quantizer, Training, straight_through


class FSQQuantizer(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505): dimension i of a latent is bounded and rounded
    to one of L_i levels, without parameters and without a loss.

    The bound is that of the paper's listing, tanh(z + shift) * half - offset, where offset is 1/2
    for an even L and 0 for an odd one, but with the constants of vector-quantize-pytorch: shift =
    atanh(offset / half) instead of tan(offset / half), so that a latent of zero stays zero, and
    half = (L - 1) * (1 + 0.001) / 2 instead of (1 - 0.001). The equation in the paper's text,
    floor(L / 2) * tanh(z), has L + 1 values for an even L.

    The codes are the rounded values divided by floor(L / 2), in [-1, 1]. The index counts the first
    dimension fastest.
    """

    @property
    def levels(self) -> np.ndarray:
        """The number of levels of each dimension, int32 [d]."""
        levels = self.options.resolve_levels(self.settings.codebook_size)
        return np.array(levels, np.int32)

    @property
    def num_codes(self) -> int:
        return int(self.levels.prod())

    @property
    def code_dim(self) -> int:
        return len(self.levels)

    @property
    def strides(self) -> np.ndarray:
        """How much one level of each dimension adds to the index, int32 [d]."""
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)

    def bound(self, z: jax.Array) -> jax.Array:
        """Maps latents [...,d] to a range of `levels` integers around zero."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = np.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half)
        return jnp.tanh(z + jnp.float32(shift)) * jnp.float32(half) - jnp.float32(offset)

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        bounded, half = self.bound(z.astype(jnp.float32)), self.levels // 2
        rounded = jnp.round(bounded)
        indices = ((rounded.astype(jnp.int32) + half) * self.strides).sum(-1)
        vectors = straight_through(bounded, rounded) / half
        return Quantized(vectors, indices, jnp.zeros(indices.shape))

    def lookup(self, indices: jax.Array) -> jax.Array:
        half = self.levels // 2
        digits = indices[..., None] // self.strides % self.levels
        return (digits - half).astype(jnp.float32) / half
