"""Binary spherical quantization."""

import math

import jax
import jax.numpy as jnp

from taming_jax.models.quantizers.interface import l2_normalize
from taming_jax.models.quantizers.lfq import BitsQuantizer


class BSQQuantizer(BitsQuantizer):
    """Binary spherical quantization (arXiv 2406.07548, section 4.1): the latent is scaled to unit
    length, u, and the code is sign(u) / sqrt(d), which also has unit length.

    loss = commitment * |u - sg(e)|^2, summed over the dimensions, + the entropy penalty, whose
    second term treats bits as independent, as in the paper: it is the sum of the entropies of the
    mean bits. The paper's tau is 2 / temperature.
    """

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.code_dim)

    def normalize(self, z: jax.Array) -> jax.Array:
        return l2_normalize(z)

    def compute_commitment_loss(self, z: jax.Array, vectors: jax.Array) -> jax.Array:
        return jnp.square(z - vectors).sum(-1)
