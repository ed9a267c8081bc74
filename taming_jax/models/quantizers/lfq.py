"""Lookup-free quantization, and the base class of quantizers with one bit per dimension."""

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.quantizers.entropy import binary_penalty
from taming_jax.models.quantizers.interface import (
    Quantized,
    Quantizer,
    Training,
    mean_square,
    straight_through,
)


class BitsQuantizer(Quantizer):
    """The base class of quantizers with one bit of the index per dimension, the first being the
    lowest. A code has the signs of the latent, times `scale`.

    The entropy penalty (entropy.py) has the probabilities softmax(-|z - e|^2 / temperature) of the
    codes, which are those of independent bits that are 1 with probability sigmoid(4 scale z /
    temperature). A subclass defines `compute_commitment_loss`.
    """

    @property
    def group_bits(self) -> int:
        """The number of bits whose joint distribution the penalty computes."""
        return 1

    @property
    def scale(self) -> float:
        """The absolute value of a code in each dimension."""
        return 1.0

    @property
    def code_dim(self) -> int:
        return self.num_codes.bit_length() - 1

    def normalize(self, z: jax.Array) -> jax.Array:
        return z

    def compute_commitment_loss(self, z: jax.Array, vectors: jax.Array) -> jax.Array:
        """Returns the commitment loss [b,h,w] without its weight."""
        raise NotImplementedError

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        options, z = self.options, self.normalize(z.astype(jnp.float32))
        bits = (z > 0).astype(jnp.int32)
        indices = (bits << jnp.arange(self.code_dim)).sum(-1)
        vectors = self.lookup(indices)
        loss = options.commitment * self.compute_commitment_loss(z, lax.stop_gradient(vectors))
        if training is not None and options.entropy_weight:
            loss += binary_penalty(4 * self.scale * z, self.group_bits, options, self.axis_name)
        return Quantized(straight_through(z, vectors), indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        bits = indices[..., None] >> jnp.arange(self.code_dim) & 1
        return self.scale * (2.0 * bits - 1.0)


class LFQQuantizer(BitsQuantizer):
    """Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737, section 3.1): the code is the sign of
    each dimension.

    loss = commitment * |z - sg(e)|^2, averaged over the dimensions, + the entropy penalty.
    """

    @property
    def group_bits(self) -> int:
        return self.options.entropy_group_bits

    def compute_commitment_loss(self, z: jax.Array, vectors: jax.Array) -> jax.Array:
        return mean_square(z, vectors)
