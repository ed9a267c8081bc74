"""The PatchGAN discriminator of pix2pix (arXiv 1611.07004), as in the official VQ-GAN."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.models.layers import BatchNorm, Conv, Dtype


class Discriminator(nn.Module):
    """A network that maps images float [b,h,w,c] to logits float32 [b,h',w',1], one per patch.

    It has `layers` 4x4 convolutions of stride 2, then two of stride 1. In training, BatchNorm uses
    the statistics of the batch over all devices along `axis_name` and updates the running
    statistics (collection `batch_stats`).
    """

    filters: int = 64
    layers: int = 3
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
        def conv(features: int, stride: int, bias: bool, name: str) -> Conv:
            return Conv(
                features, (4, 4), strides=stride, padding=1, use_bias=bias, dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.02), name=name,
            )  # fmt: skip

        h = nn.leaky_relu(conv(self.filters, 2, True, "conv_0")(images), 0.2)
        for layer in range(1, self.layers + 1):
            features = self.filters * min(2**layer, 8)
            stride = 2 if layer < self.layers else 1
            h = conv(features, stride, False, f"conv_{layer}")(h)
            h = BatchNorm(self.dtype, self.axis_name, name=f"norm_{layer}")(h, train)
            h = nn.leaky_relu(h, 0.2)
        return conv(1, 1, True, f"conv_{self.layers + 1}")(h).astype(jnp.float32)
