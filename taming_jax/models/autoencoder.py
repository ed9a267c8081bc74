"""Encoder and decoder of the VQ-GAN, as the official code builds them (arXiv 2012.09841, table 7).

Levels are numbered from full resolution; between two levels the image is halved or doubled. The
submodules' names are those of the official state dicts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import VQGANConfig
from taming_jax.models.layers import (
    AttentionBlock,
    Downsample,
    Dtype,
    GroupNorm,
    ResidualBlock,
    Upsample,
    conv,
)


class Encoder(nn.Module):
    """Images [b,h,w,c] to latents [b, h / 2**(levels - 1), w / 2**(levels - 1), latent_channels].

    `resolution` is the height the network is built for: it says which levels have attention.
    """

    settings: VQGANConfig
    resolution: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        settings, levels = self.settings, len(self.settings.multipliers)
        h = conv(settings.channels, 3, self.dtype, "conv_in")(x)
        for level in range(levels):
            for block in range(settings.blocks):
                h = residual(self, f"down_{level}", block, level, h)
            if level < levels - 1:
                h = Downsample(self.dtype, name=f"down_{level}_downsample")(h)
        h = middle(self.dtype, h)
        h = nn.silu(GroupNorm(self.dtype, name="norm_out")(h))
        return conv(settings.latent_channels, 3, self.dtype, "conv_out")(h)


class Decoder(nn.Module):
    """Latents [b,h',w',d] to images [b, h' * 2**(levels - 1), w' * 2**(levels - 1), out_channels].

    The input of the last convolution is sown as `intermediates/last`: the adaptive weight is taken
    at that convolution's kernel.
    """

    settings: VQGANConfig
    resolution: int
    out_channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        settings, levels = self.settings, len(self.settings.multipliers)
        h = conv(settings.channels * settings.multipliers[-1], 3, self.dtype, "conv_in")(z)
        h = middle(self.dtype, h)
        for level in reversed(range(levels)):
            for block in range(settings.decoder_blocks or settings.blocks + 1):
                h = residual(self, f"up_{level}", block, level, h)
            if level > 0:
                h = Upsample(self.dtype, name=f"up_{level}_upsample")(h)
        h = nn.silu(GroupNorm(self.dtype, name="norm_out")(h))
        self.sow("intermediates", "last", h)
        return conv(self.out_channels, 3, self.dtype, "conv_out")(h)


def residual(net: Encoder | Decoder, name: str, block: int, level: int, h: jax.Array) -> jax.Array:
    """A level's residual block, with attention where the network has it at that height. With
    `remat` its activations are computed again in the backward pass, not kept."""
    settings = net.settings
    kind = nn.remat(ResidualBlock) if settings.remat else ResidualBlock
    channels = settings.channels * settings.multipliers[level]
    h = kind(channels, net.dtype, name=f"{name}_block_{block}")(h)
    if net.resolution // 2**level in settings.attention_resolutions:
        h = AttentionBlock(net.dtype, name=f"{name}_attn_{block}")(h)
    return h


def middle(dtype: Dtype, h: jax.Array) -> jax.Array:
    """What both networks do at the lowest resolution."""
    h = ResidualBlock(h.shape[-1], dtype, name="mid_block_1")(h)
    h = AttentionBlock(dtype, name="mid_attn_1")(h)
    return ResidualBlock(h.shape[-1], dtype, name="mid_block_2")(h)
