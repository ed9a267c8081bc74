"""Index backpropagation quantization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.quantizers.entropy import categorical_penalty
from taming_jax.models.quantizers.gumbel import choose_codes
from taming_jax.models.quantizers.interface import (
    Quantized,
    Quantizer,
    Training,
    l2_normalize,
    mean_square,
)

# Cosines are at most 1, for which the softmax over many codes would be almost uniform.
COSINE_SCALE = 10.0


class IBQQuantizer(Quantizer):
    """Index backpropagation quantization (arXiv 2412.02692): the code with the largest product z e.
    In the backward pass, the choice is softmax(z e) over all codes, so that each step trains all of
    them.

    loss = |z - q|^2 + |z - sg(e)|^2 + commitment * |sg(z) - e|^2, averaged over the d dimensions, +
    the entropy penalty (entropy.py). q is the code with the gradient through the softmax. This is
    the double quantization loss of the official code.

    `l2_normalise` scales latents and codes to unit length, and the products by `COSINE_SCALE`.
    Codes start normally distributed. The official uniform distribution in [-1/k, 1/k] makes the
    softmax uniform, so that the codes hardly move apart in the first hundreds of steps.
    """

    def setup(self) -> None:
        k, d = self.num_codes, self.code_dim
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (k, d))

    def normalize(self, x: jax.Array) -> jax.Array:
        return l2_normalize(x) if self.options.l2_normalise else x

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        options, fixed = self.options, lax.stop_gradient
        z, codes = self.normalize(z.astype(jnp.float32)), self.normalize(self.codebook)
        products = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
        scores = products * (COSINE_SCALE if options.l2_normalise else 1)
        indices = jnp.argmax(scores, -1).astype(jnp.int32)
        vectors = chosen = codes[indices]
        if training is not None:
            vectors = choose_codes(scores, indices, codes)
        loss = mean_square(z, vectors) + mean_square(z, fixed(chosen))
        loss += options.commitment * mean_square(fixed(z), chosen)
        if training is not None and options.entropy_weight:
            loss += categorical_penalty(products, "ibq", options, self.axis_name)
        return Quantized(vectors, indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        return self.normalize(self.codebook)[indices]
