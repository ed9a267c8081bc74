"""Index backpropagation quantization."""

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.quantizers.entropy import categorical_penalty
from taming_jax.models.quantizers.gumbel import choose_codes
from taming_jax.models.quantizers.interface import (
    Quantized,
    Quantizer,
    Training,
    mean_square,
)
from taming_jax.models.quantizers.vq import uniform


class IBQQuantizer(Quantizer):
    """Index backpropagation quantization (arXiv 2412.02692): the code with the largest product z e.
    In the backward pass, the choice is softmax(z e) over all codes, so that each step trains all of
    them.

    loss = |z - q|^2 + |z - sg(e)|^2 + commitment * |sg(z) - e|^2, averaged over the d dimensions, +
    the entropy penalty (entropy.py). q is the code with the gradient through the softmax. This is
    the double quantization loss of the official code.
    """

    def setup(self) -> None:
        k, d = self.num_codes, self.code_dim
        self.codebook = self.param("codebook", uniform(1 / k), (k, d))

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        z, codes, options = z.astype(jnp.float32), self.codebook, self.settings.ibq
        fixed = lax.stop_gradient
        scores = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
        indices = jnp.argmax(scores, -1).astype(jnp.int32)
        vectors = chosen = codes[indices]
        if training is not None:
            vectors = choose_codes(scores, indices, codes)
        loss = mean_square(z, vectors) + mean_square(z, fixed(chosen))
        loss += options.commitment * mean_square(fixed(z), chosen)
        if training is not None and options.entropy_weight:
            loss += categorical_penalty(scores, "ibq", options, self.axis_name)
        return Quantized(vectors, indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        return self.codebook[indices]
