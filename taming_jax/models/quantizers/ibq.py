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
    l2_normalize,
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

    def normalize(self, x: jax.Array) -> jax.Array:
        return l2_normalize(x) if self.settings.ibq.l2_normalise else x

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        z, codes, fixed = self.normalize(z.astype(jnp.float32)), self.get_codes(), lax.stop_gradient
        options = self.settings.ibq
        scores = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
        indices = jnp.argmax(scores, -1).astype(jnp.int32)
        vectors = choose_codes(scores, indices, codes)
        chosen = codes[indices]
        loss = mean_square(z, vectors) + mean_square(z, fixed(chosen))
        loss += options.commitment * mean_square(fixed(z), chosen)
        if training is not None and options.entropy_weight:
            loss += categorical_penalty(scores, "ibq", options, self.axis_name)
        return Quantized(vectors, indices, loss)

    def get_codes(self) -> jax.Array:
        """Returns the codes float32 [k,d]."""
        return self.normalize(self.codebook)

    def lookup(self, indices: jax.Array) -> jax.Array:
        return self.get_codes()[indices]
