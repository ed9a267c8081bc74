"""The generator of stage 1: an encoder, a quantizer, and a decoder."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import Config, VQGANConfig
from taming_jax.errors import UserError
from taming_jax.models.autoencoder import Decoder, Encoder
from taming_jax.models.layers import Dtype, conv
from taming_jax.models.quantizers import QUANTIZERS, Quantized, Quantizer, Training
from taming_jax.parallel.devices import resolve_dtype

MAX_PIXELS = 2**20  # the most pixels, over all images, that a device encodes or decodes at once


class Reconstruction(NamedTuple):
    """Images float32 [b,h,w,c], approximately in [-1, 1], and the output of the quantizer."""

    images: jax.Array
    quantized: Quantized


class VQGAN(nn.Module):
    """An autoencoder of images float [b,h,w,c] in [-1, 1] whose latents are a grid of codes."""

    encoder: nn.Module
    quantizer: Quantizer
    decoder: nn.Module
    settings: VQGANConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.quant_conv = conv(self.quantizer.code_dim, 1, self.dtype)
        self.post_quant_conv = conv(self.settings.latent_channels, 1, self.dtype)

    def __call__(self, images: jax.Array, training: Training | None = None) -> Reconstruction:
        quantized = self.encode(images, training)
        return Reconstruction(self.decode(quantized.vectors), quantized)

    def encode(self, images: jax.Array, training: Training | None = None) -> Quantized:
        """Encodes images float [b,h,w,c] as codes; see `Quantized`."""
        return self.quantizer(self.quant_conv(self.encoder(images)), training)

    def decode(self, vectors: jax.Array) -> jax.Array:
        """Decodes codes float [b,h',w',d] to images float32 [b,h,w,c]."""
        return self.decoder(self.post_quant_conv(vectors)).astype(jnp.float32)

    def decode_indices(self, indices: jax.Array) -> jax.Array:
        """Decodes indices int [b,h',w'] to images float32 [b,h,w,c]."""
        return self.decode(self.quantizer.lookup(indices))


def build_vqgan(config: Config, axis_name: str | None = None) -> VQGAN:
    """Builds the generator that a config describes. `axis_name` is the mapped axis of devices in
    training, or None.

    Raises UserError if the number of codes of the quantizer is not `codebook_size`.
    """
    settings, data = config.vqgan, config.data
    dtype = jnp.dtype(resolve_dtype(config.dtype))
    quantizer = QUANTIZERS[settings.quantizer](settings, axis_name)
    if quantizer.num_codes != settings.codebook_size:
        raise UserError(
            f"--vqgan.codebook-size is {settings.codebook_size}, but these settings of the "
            f"quantizer {settings.quantizer} give {quantizer.num_codes} codes. Set "
            f"--vqgan.codebook-size {quantizer.num_codes}."
        )
    return VQGAN(
        encoder=Encoder(settings, data.image_size, dtype),
        quantizer=quantizer,
        decoder=Decoder(settings, data.image_size, data.channels, dtype),
        settings=settings,
        dtype=dtype,
    )


def max_batch(pixels: int, limit: int) -> int:
    """Returns how many images of `pixels` pixels each a device encodes or decodes at once: as many
    as `MAX_PIXELS` allows, so that they fit in memory, but at least one and at most `limit`."""
    return min(max(MAX_PIXELS // pixels, 1), limit)


def reconstruct(model: VQGAN, params: Any, images: jax.Array) -> Reconstruction:
    """Encodes and decodes images float [b,h,w,c] in [-1, 1]."""
    return cast(Reconstruction, model.apply({"params": params}, images))


def encode(model: VQGAN, params: Any, images: jax.Array) -> Quantized:
    """Encodes images float [b,h,w,c] in [-1, 1] as codes."""
    return cast(Quantized, model.apply({"params": params}, images, method=VQGAN.encode))


def decode_indices(model: VQGAN, params: Any, indices: jax.Array) -> jax.Array:
    """Decodes indices int [b,h',w'] to images float32 [b,h,w,c], clipped to [-1, 1].

    Images with more than `MAX_PIXELS` pixels together are decoded in several equal parts, one after
    another.
    """

    def decode(indices: jax.Array) -> jax.Array:
        images = model.apply({"params": params}, indices, method=VQGAN.decode_indices)
        return jnp.clip(cast(jax.Array, images), -1, 1)

    n, *grid = indices.shape
    limit = max_batch(grid[0] * grid[1] * model.settings.downsample_factor**2, n)
    size = max(part for part in range(1, limit + 1) if n % part == 0)
    if size == n:
        return decode(indices)
    parts = jax.lax.map(decode, indices.reshape(-1, size, *grid))
    return parts.reshape(n, *parts.shape[2:])
