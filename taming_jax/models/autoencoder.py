"""The encoder and decoder of the VQ-GAN, as in the official code (arXiv 2012.09841, table 7).

Level 0 has full resolution. Between levels, the encoder halves and the decoder doubles the height
and width. The names of the submodules follow the official state dicts.
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
    """An encoder of images [b,h,w,c] to latents [b,h/f,w/f,latent_channels], f = 2**(levels - 1).

    `resolution` is the image height that the network is built for. It determines which levels have
    attention.
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
                h = apply_residual_block(self, f"down_{level}", block, level, h)
            if level < levels - 1:
                h = Downsample(self.dtype, name=f"down_{level}_downsample")(h)
        h = apply_middle_blocks(self, h)
        h = GroupNorm(self.dtype, silu=True, name="norm_out")(h)
        return conv(settings.latent_channels, 3, self.dtype, "conv_out")(h)


class Decoder(nn.Module):
    """A decoder of latents [b,h',w',latent_channels] to images [b,f*h',f*w',out_channels],
    f = 2**(levels - 1).

    It sows the input of the last convolution as `intermediates/last`, because the adaptive weight
    needs the gradients with respect to the kernel of that convolution.
    """

    settings: VQGANConfig
    resolution: int
    out_channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        settings, levels = self.settings, len(self.settings.multipliers)
        h = conv(settings.channels * settings.multipliers[-1], 3, self.dtype, "conv_in")(z)
        h = apply_middle_blocks(self, h)
        for level in reversed(range(levels)):
            for block in range(settings.decoder_blocks or settings.blocks + 1):
                h = apply_residual_block(self, f"up_{level}", block, level, h)
            if level > 0:
                h = Upsample(self.dtype, name=f"up_{level}_upsample")(h)
        h = GroupNorm(self.dtype, silu=True, name="norm_out")(h)
        self.sow("intermediates", "last", h)
        return conv(self.out_channels, 3, self.dtype, "conv_out")(h)


def apply_residual_block(
    net: Encoder | Decoder, name: str, block: int, level: int, h: jax.Array
) -> jax.Array:
    """Applies a residual block of a level, followed by attention if the network has attention at
    the height of that level. With `remat`, the backward pass recomputes the activations."""
    settings = net.settings
    block_type = nn.remat(ResidualBlock) if settings.remat else ResidualBlock
    channels = settings.channels * settings.multipliers[level]
    h = block_type(channels, net.dtype, name=f"{name}_block_{block}")(h)
    if net.resolution // 2**level in settings.attention_resolutions:
        h = AttentionBlock(net.dtype, name=f"{name}_attn_{block}")(h)
    return h


def apply_middle_blocks(net: Encoder | Decoder, h: jax.Array) -> jax.Array:
    """Applies the blocks that both networks have at the lowest resolution."""
    h = ResidualBlock(h.shape[-1], net.dtype, name="mid_block_1")(h)
    if net.settings.mid_attention:
        h = AttentionBlock(net.dtype, name="mid_attn_1")(h)
    return ResidualBlock(h.shape[-1], net.dtype, name="mid_block_2")(h)
