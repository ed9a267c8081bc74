"""Quantizers, which map latents to entries of a codebook, and indices back to codes."""

from typing import ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.config.schema import VQGANConfig
from taming_jax.models.layers import conv


class Quantized(NamedTuple):
    """The output of a quantizer for latents z [b,h,w,d].

    vectors: the codes, float32 [b,h,w,d], with a straight-through gradient to z.
    indices: int32 [b,h,w], in raster order.
    loss: the codebook and commitment loss of each position, float32 [b,h,w].
    """

    vectors: jax.Array
    indices: jax.Array
    loss: jax.Array


class Noise(NamedTuple):
    """The sampling inputs of a stochastic quantizer: one key per image [b], and the temperature,
    float32 []."""

    keys: jax.Array
    temperature: jax.Array


class Quantizer(Protocol):
    """The interface of a quantizer: a Linen module, listed in `QUANTIZERS`, whose only field is the
    settings.

    stochastic: whether training samples the codes, using `noise`.
    """

    stochastic: ClassVar[bool]

    def __init__(self, settings: VQGANConfig): ...

    @property
    def num_codes(self) -> int:
        """The number of codes, which must equal `codebook_size` (see models/vqgan.py)."""

    def __call__(self, z: jax.Array, noise: Noise | None = None) -> Quantized:
        """Quantizes latents float [b,h,w,d]."""

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Returns the codes float32 [b,h,w,d] for indices int32 [b,h,w]."""


class VectorQuantizer(nn.Module):
    """The quantizer of VQ-VAE (arXiv 1711.00937, equation 3), in float32.

    loss = |sg(z) - e|^2 + commitment * |z - sg(e)|^2, averaged over the d dimensions;
    `legacy_commitment` puts the weight on the other term, as the official code does by default.
    `l2_normalise` first scales the latents and the codes to unit length (arXiv 2110.04627, section
    3.2)."""

    stochastic: ClassVar[bool] = False
    settings: VQGANConfig

    @property
    def num_codes(self) -> int:
        return self.settings.codebook_size

    def setup(self) -> None:
        k, d = self.num_codes, self.settings.code_dim
        # The directions of normally distributed codes are uniformly distributed. Without
        # normalization, the codes start small, as in the official code.
        init = nn.initializers.normal(1.0) if self.settings.l2_normalise else uniform(1 / k)
        self.codebook = self.param("codebook", init, (k, d))

    def __call__(self, z: jax.Array, noise: Noise | None = None) -> Quantized:
        z = z.astype(jnp.float32)
        settings, codes = self.settings, self.codebook
        if settings.l2_normalise:
            z, codes = l2_normalize(z), l2_normalize(codes)
        # |z|^2 is omitted from |z - e|^2 because it is the same for every code. A product in TF32
        # could choose another code if two codes are almost equally near.
        scores = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
        indices = jnp.argmin(jnp.square(codes).sum(-1) - 2 * scores, -1).astype(jnp.int32)
        vectors = codes[indices]
        codebook_loss = jnp.square(vectors - lax.stop_gradient(z)).mean(-1)
        commitment_loss = jnp.square(lax.stop_gradient(vectors) - z).mean(-1)
        if settings.legacy_commitment:
            loss = commitment_loss + settings.commitment * codebook_loss
        else:
            loss = codebook_loss + settings.commitment * commitment_loss
        return Quantized(z + lax.stop_gradient(vectors - z), indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Returns the codes float32 [b,h,w,d] for indices int32 [b,h,w]."""
        codes = self.codebook
        return (l2_normalize(codes) if self.settings.l2_normalise else codes)[indices]


class GumbelQuantizer(nn.Module):
    """A quantizer that samples codes with the Gumbel-softmax trick (arXiv 1611.01144).

    As in the official GumbelVQ, a 1x1 convolution maps latents to logits. With `noise`, the module
    samples a code, which is one-hot in the forward pass and soft in the backward pass. Without
    `noise`, it takes the most likely code, whereas the official code also samples in evaluation.

    loss = kl_weight * KL(softmax(logits) || uniform), for each position.
    """

    stochastic: ClassVar[bool] = True
    settings: VQGANConfig

    @property
    def num_codes(self) -> int:
        return self.settings.codebook_size

    def setup(self) -> None:
        k, d = self.num_codes, self.settings.code_dim
        self.proj = conv(k, 1, jnp.float32)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (k, d))

    def __call__(self, z: jax.Array, noise: Noise | None = None) -> Quantized:
        with jax.default_matmul_precision("highest"):
            logits = self.proj(z.astype(jnp.float32))
        codes, probabilities = self.codebook, nn.softmax(logits)
        divergence = (probabilities * jnp.log(probabilities * codes.shape[0] + 1e-10)).sum(-1)
        loss = divergence * self.settings.kl_weight
        if noise is None:
            indices = jnp.argmax(logits, -1).astype(jnp.int32)
            return Quantized(codes[indices], indices, loss)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(noise.keys)
        perturbed = (logits + gumbel) / noise.temperature
        indices = jnp.argmax(perturbed, -1).astype(jnp.int32)
        soft = nn.softmax(perturbed)
        hard = jax.nn.one_hot(indices, codes.shape[0])
        weights = hard + soft - lax.stop_gradient(soft)
        vectors = jnp.matmul(weights, codes, precision=lax.Precision.HIGHEST)
        return Quantized(vectors, indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Returns the codes float32 [b,h,w,d] for indices int32 [b,h,w]."""
        return self.codebook[indices]


QUANTIZERS: dict[str, type[Quantizer]] = {
    "nearest": VectorQuantizer,
    "gumbel": GumbelQuantizer,
}


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scales vectors [..., d] to unit length. The constant keeps the gradient finite at zero."""
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def uniform(bound: float) -> nn.initializers.Initializer:
    """Returns an initializer that draws uniformly from [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
