"""The generator of stage 1: encoder, quantizer and decoder."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import Config, VQGANConfig
from taming_jax.errors import UserError
from taming_jax.models.autoencoder import Decoder, Encoder
from taming_jax.models.layers import Dtype, conv
from taming_jax.models.quantizers import QUANTIZERS, Noise, Quantized, Quantizer

PIXELS = 2**20  # of all images that a device encodes or decodes at once


class Reconstruction(NamedTuple):
    """`images` float32 [b,h,w,c], about [-1, 1], and what the quantizer returned."""

    images: jax.Array
    quantized: Quantized


class VQGAN(nn.Module):
    """Images float [b,h,w,c] in [-1, 1] through a grid of codes and back."""

    encoder: nn.Module
    quantizer: Quantizer
    decoder: nn.Module
    settings: VQGANConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.quant_conv = conv(self.settings.code_dim, 1, self.dtype)
        self.post_quant_conv = conv(self.settings.latent_channels, 1, self.dtype)

    def __call__(self, images: jax.Array, noise: Noise | None = None) -> Reconstruction:
        quantized = self.encode(images, noise)
        return Reconstruction(self.decode(quantized.vectors), quantized)

    def encode(self, images: jax.Array, noise: Noise | None = None) -> Quantized:
        """Images float [b,h,w,c] to codes; see Quantized."""
        return self.quantizer(self.quant_conv(self.encoder(images)), noise)

    def decode(self, vectors: jax.Array) -> jax.Array:
        """Codes float [b,h',w',d] to images float32 [b,h,w,c]."""
        return self.decoder(self.post_quant_conv(vectors)).astype(jnp.float32)

    def decode_indices(self, indices: jax.Array) -> jax.Array:
        """Indices int [b,h',w'] to images float32 [b,h,w,c]."""
        return self.decode(self.quantizer.lookup(indices))


def build_vqgan(config: Config) -> VQGAN:
    """The generator that a config describes. UserError where its quantizer has another number of
    codes."""
    settings, data, dtype = config.vqgan, config.data, jnp.dtype(config.dtype)
    quantizer = QUANTIZERS[settings.quantizer](settings)
    if quantizer.num_codes != settings.codebook_size:
        raise UserError(
            f"--vqgan.codebook-size is {settings.codebook_size}, but these settings of the "
            f"quantizer {settings.quantizer} give {quantizer.num_codes} codes; take that."
        )
    return VQGAN(
        encoder=Encoder(settings, data.image_size, dtype),
        quantizer=quantizer,
        decoder=Decoder(settings, data.image_size, data.channels, dtype),
        settings=settings,
        dtype=dtype,
    )


def max_batch(pixels: int, most: int) -> int:
    """How many images of so many pixels a device encodes or decodes at once, so that large ones fit
    in memory: a million pixels in all, at most so many images."""
    return min(max(PIXELS // pixels, 1), most)


def reconstruct(model: VQGAN, params: Any, images: jax.Array) -> Reconstruction:
    """Images float [b,h,w,c] in [-1, 1] through the codes and back."""
    return cast(Reconstruction, model.apply({"params": params}, images))


def encode(model: VQGAN, params: Any, images: jax.Array) -> Quantized:
    """Images float [b,h,w,c] in [-1, 1] to codes."""
    return cast(Quantized, model.apply({"params": params}, images, method=VQGAN.encode))


def decode_indices(model: VQGAN, params: Any, indices: jax.Array) -> jax.Array:
    """Indices int [b,h',w'] to images float32 [b,h,w,c], clipped to [-1, 1]."""
    images = model.apply({"params": params}, indices, method=VQGAN.decode_indices)
    return jnp.clip(cast(jax.Array, images), -1, 1)
