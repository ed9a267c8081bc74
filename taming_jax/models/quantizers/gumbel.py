"""The quantizer with the Gumbel-softmax trick."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.layers import conv
from taming_jax.models.quantizers.interface import Quantized, Quantizer, Training


class GumbelQuantizer(Quantizer):
    """A quantizer that samples codes with the Gumbel-softmax trick (arXiv 1611.01144).

    As in the official GumbelVQ, a 1x1 convolution maps latents to logits. In training, the module
    samples a code, which is one-hot in the forward pass and soft in the backward pass. Otherwise,
    it takes the most likely code, whereas the official code also samples in evaluation.

    loss = kl_weight * KL(softmax(logits) || uniform), for each position.
    """

    def setup(self) -> None:
        k, d = self.num_codes, self.code_dim
        self.proj = conv(k, 1, jnp.float32)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (k, d))

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        with jax.default_matmul_precision("highest"):
            logits = self.proj(z.astype(jnp.float32))
        probabilities = nn.softmax(logits)
        divergence = (probabilities * jnp.log(probabilities * self.num_codes + 1e-10)).sum(-1)
        loss = divergence * self.options.kl_weight
        if training is None:
            indices = jnp.argmax(logits, -1).astype(jnp.int32)
            return Quantized(self.codebook[indices], indices, loss)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(training.keys)
        perturbed = (logits + gumbel) / self.get_temperature(training.progress)
        indices = jnp.argmax(perturbed, -1).astype(jnp.int32)
        return Quantized(choose_codes(perturbed, indices, self.codebook), indices, loss)

    def get_temperature(self, progress: jax.Array) -> jax.Array:
        """Returns the temperature after a fraction of the run: a cosine from the first value of the
        setting to the second."""
        first, last = self.options.temperature
        return last + (first - last) * (1 + jnp.cos(jnp.pi * progress)) / 2

    def lookup(self, indices: jax.Array) -> jax.Array:
        return self.codebook[indices]


def choose_codes(logits: jax.Array, indices: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the codes [k,d] of the indices [b,h,w]. The gradient of the logits [b,h,w,k] is that
    of the average of all codes, weighted by softmax(logits)."""
    average = jnp.matmul(
        nn.softmax(logits), lax.stop_gradient(codes), precision=lax.Precision.HIGHEST
    )
    return codes[indices] + average - lax.stop_gradient(average)
