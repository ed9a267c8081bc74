"""Quantizers: from latents to the entries of a codebook, and back from indices."""

from typing import ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.config.schema import VQGANConfig
from taming_jax.models.layers import conv


class Quantized(NamedTuple):
    """What a quantizer makes of latents z [b,h,w,d].

    vectors: the codes in place of z, float32 [b,h,w,d], with the gradient going straight to z.
    indices: int32 [b,h,w], raster order.
    loss: codebook and commitment term of each place, float32 [b,h,w].
    """

    vectors: jax.Array
    indices: jax.Array
    loss: jax.Array


class Noise(NamedTuple):
    """A key an image [b], and the temperature float32 []."""

    keys: jax.Array
    temperature: jax.Array


class Quantizer(Protocol):
    """What a quantizer needs to have: a Linen module of these, listed in `QUANTIZERS`, whose only
    field is the settings.

    draws: whether training draws codes, with `noise`.
    """

    draws: ClassVar[bool]

    def __init__(self, settings: VQGANConfig): ...

    @property
    def num_codes(self) -> int:
        """How many codes there are; `codebook_size` must be the same (models/vqgan.py)."""

    def __call__(self, z: jax.Array, noise: Noise | None = None) -> Quantized:
        """Latents float [b,h,w,d] as codes."""

    def lookup(self, indices: jax.Array) -> jax.Array:
        """The codes at indices int32 [b,h,w], float32 [b,h,w,d]."""


class VectorQuantizer(nn.Module):
    """VQ-VAE's quantizer (arXiv 1711.00937, equation 3) in float32.

    loss = |sg(z) - e|^2 + commitment * |z - sg(e)|^2, averaged over the d dimensions;
    `legacy_commitment` puts the weight on the other term, as the official code did at first. With
    `l2_normalise` the latents and the codes are scaled to length one first (arXiv 2110.04627,
    section 3.2).
    """

    draws: ClassVar[bool] = False
    settings: VQGANConfig

    @property
    def num_codes(self) -> int:
        return self.settings.codebook_size

    def setup(self) -> None:
        k, d = self.num_codes, self.settings.code_dim
        # Directions are spread evenly; plain codes start small, as in the official code.
        init = nn.initializers.normal(1.0) if self.settings.l2_normalise else uniform(1 / k)
        self.codebook = self.param("codebook", init, (k, d))

    def __call__(self, z: jax.Array, noise: Noise | None = None) -> Quantized:
        z = z.astype(jnp.float32)
        settings, codes = self.settings, self.codebook
        if settings.l2_normalise:
            z, codes = l2_normalize(z), l2_normalize(codes)
        # |z - e|^2 without |z|^2, which is the same for every code. `highest`: a TF32 product
        # would choose another code where two are almost as near.
        scores = jnp.matmul(z, codes.T, precision=lax.Precision.HIGHEST)
        indices = jnp.argmin(jnp.square(codes).sum(-1) - 2 * scores, -1).astype(jnp.int32)
        vectors = one_hot_lookup(codes, indices)
        on_codes = jnp.square(vectors - lax.stop_gradient(z)).mean(-1)
        on_latents = jnp.square(lax.stop_gradient(vectors) - z).mean(-1)
        if settings.legacy_commitment:
            loss = on_latents + settings.commitment * on_codes
        else:
            loss = on_codes + settings.commitment * on_latents
        return Quantized(z + lax.stop_gradient(vectors - z), indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """The codes at indices int32 [b,h,w], float32 [b,h,w,d]."""
        codes = self.codebook
        return (l2_normalize(codes) if self.settings.l2_normalise else codes)[indices]


class GumbelQuantizer(nn.Module):
    """Codes drawn by the Gumbel-softmax trick (arXiv 1611.01144), as the official GumbelVQ does it:
    a 1x1 convolution makes logits of latents. With `noise` a code is drawn, one-hot forward and
    soft backward; without, it is the likeliest (the official code draws in evaluation, too).

    loss = kl_weight * KL(softmax(logits) || all codes alike), of each place.
    """

    draws: ClassVar[bool] = True
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
        codes, likely = self.codebook, nn.softmax(logits)
        divergence = (likely * jnp.log(likely * codes.shape[0] + 1e-10)).sum(-1)
        loss = divergence * self.settings.kl_weight
        if noise is None:
            indices = jnp.argmax(logits, -1).astype(jnp.int32)
            return Quantized(one_hot_lookup(codes, indices), indices, loss)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(noise.keys)
        drawn = (logits + gumbel) / noise.temperature
        indices = jnp.argmax(drawn, -1).astype(jnp.int32)
        soft = nn.softmax(drawn)
        hard = jax.nn.one_hot(indices, codes.shape[0])
        weights = hard + soft - lax.stop_gradient(soft)
        vectors = jnp.matmul(weights, codes, precision=lax.Precision.HIGHEST)
        return Quantized(vectors, indices, loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """The codes at indices int32 [b,h,w], float32 [b,h,w,d]."""
        return self.codebook[indices]


QUANTIZERS: dict[str, type[Quantizer]] = {
    "nearest": VectorQuantizer,
    "gumbel": GumbelQuantizer,
}


def one_hot_lookup(codes: jax.Array, indices: jax.Array) -> jax.Array:
    """`codes[indices]` as a one-hot product, which is exact and whose gradient is a product too: a
    gather's gradient is a scatter-add, hundreds of times slower on some GPUs."""
    one_hot = jax.nn.one_hot(indices, codes.shape[0], dtype=codes.dtype)
    return jnp.matmul(one_hot, codes, precision=lax.Precision.HIGHEST)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Vectors [..., d] scaled to length one; the small constant keeps a zero's gradient finite."""
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
