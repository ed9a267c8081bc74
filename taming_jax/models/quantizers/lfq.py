"""Lookup-free quantization."""

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.config.quantizers import LFQConfig
from taming_jax.models.quantizers.entropy import binary_penalty
from taming_jax.models.quantizers.interface import (
    Quantized,
    Quantizer,
    Training,
    mean_square,
    straight_through,
)


class LFQQuantizer(Quantizer):
    """Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737, section 3.1): each dimension of a
    latent is a bit of the index, the first being the lowest, and the code has its signs.

    loss = commitment * mean |z - sg(e)|^2 + the entropy penalty (entropy.py). The probabilities of
    the codes are softmax(-|z - e|^2 / temperature), which are those of independent bits that are 1
    with probability sigmoid(4 z / temperature).
    """

    scale = 1.0

    @property
    def options(self) -> LFQConfig:
        return self.settings.lfq

    @property
    def code_dim(self) -> int:
        return self.num_codes.bit_length() - 1

    def normalize(self, z: jax.Array) -> jax.Array:
        return z

    def commit(self, z: jax.Array, vectors: jax.Array) -> jax.Array:
        """Returns the commitment loss without its weight, [b,h,w]."""
        return mean_square(z, vectors)

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        z = self.normalize(z.astype(jnp.float32))
        bits = (z > 0).astype(jnp.int32)
        indices = (bits << jnp.arange(self.code_dim)).sum(-1)
        vectors = self.lookup(indices)
        loss = self.options.commitment * self.commit(z, lax.stop_gradient(vectors))
        if training is not None and self.options.entropy_weight:
            logits, group_bits = 4 * self.scale * z, self.options.entropy_group_bits
            loss += binary_penalty(logits, group_bits, self.options, self.axis_name)
        return Quantized(straight_through(z, vectors), indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        bits = indices[..., None] >> jnp.arange(self.code_dim) & 1
        return self.scale * (2.0 * bits - 1.0)
