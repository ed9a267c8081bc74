"""The building blocks of the VQ-GAN, with the arithmetic of the official code ("Taming
Transformers", arXiv 2012.09841). Images are [b,h,w,c] and parameters float32; `dtype` is the dtype
of the computation.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Dtype = Any
# PyTorch's default initializer for convolutions, which the official models use: uniform in
# [-x, x] with x = 1 / sqrt(fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def promote_except_bias(
    inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: Dtype
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Casts the inputs and the kernel of a layer to `dtype`, but not the bias."""
    return inputs.astype(dtype), kernel.astype(dtype), bias


class Conv(nn.Conv):
    """A convolution that adds its bias in float32. The gradient of the bias is a sum over all
    positions of all images, which loses most of its precision in bfloat16."""

    promote_dtype: Any = promote_except_bias

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs).astype(self.dtype)


class Dense(nn.Dense):
    """A dense layer that adds its bias in float32, like `Conv`."""

    promote_dtype: Any = promote_except_bias

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs).astype(self.dtype)


def conv(features: int, size: int, dtype: Dtype, name: str | None = None) -> Conv:
    """Returns a convolution that keeps the height and width."""
    padding = size // 2
    return Conv(
        features, (size, size), padding=padding, dtype=dtype, kernel_init=kernel_init, name=name
    )


class GroupNorm(nn.Module):
    """Group normalization of [b,h,w,c], with statistics in float32.

    The number of groups is the largest number up to 32 that divides the number of channels; in the
    official models it is 32. The means are taken over space before the channels are grouped,
    because XLA's CPU code is slow at reductions whose last axis has one or two channels.
    """

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6  # as in the official code; PyTorch's default is 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        groups = next(g for g in range(min(32, c), 0, -1) if c % g == 0)
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))

        def group_mean(values: jax.Array) -> jax.Array:
            means = values.mean((1, 2)).reshape(b, groups, c // groups).mean(-1)
            return jnp.repeat(means, c // groups, -1)[:, None, None]

        x = x.astype(jnp.float32)
        centered = x - group_mean(x)
        inverse_std = lax.rsqrt(group_mean(jnp.square(centered)) + self.epsilon)
        return (centered * (inverse_std * scale) + bias).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalization over b, h and w, and the devices along `axis_name`. Like PyTorch's
    BatchNorm2d, and unlike Flax's, it keeps the unbiased variance as the running variance."""

    dtype: Dtype = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        scale = self.param("scale", init_batch_norm_scale, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))
        x = x.astype(jnp.float32)
        if train:
            axis = None if self.is_initializing() else self.axis_name

            def batch_mean(values: jax.Array) -> jax.Array:
                mean = values.mean((0, 1, 2))
                return mean if axis is None else lax.pmean(mean, axis)

            mean = batch_mean(x)
            var = batch_mean(jnp.square(x - mean))
            if not self.is_initializing():
                n = x.size // c * (1 if axis is None else lax.axis_size(axis))
                keep = 1 - self.momentum
                running_mean.value = keep * running_mean.value + self.momentum * mean
                running_var.value = keep * running_var.value + self.momentum * var * n / (n - 1)
        else:
            mean, var = running_mean.value, running_var.value
        return ((x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias).astype(self.dtype)


def init_batch_norm_scale(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializes the scale of a BatchNorm as pix2pix does."""
    return 1 + 0.02 * jax.random.normal(key, shape)


class ResidualBlock(nn.Module):
    """A residual block of two normalized 3x3 convolutions, from [b,h,w,c] to [b,h,w,features]."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(GroupNorm(self.dtype, name="norm1")(x))
        h = conv(self.features, 3, self.dtype, "conv1")(h)
        h = nn.silu(GroupNorm(self.dtype, name="norm2")(h))
        h = conv(self.features, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of an image, with a residual connection."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        normalized = GroupNorm(self.dtype, name="norm")(x).reshape(b, h * w, 1, c)
        q, k, v = (
            conv(c, 1, self.dtype, name)(normalized).reshape(b, h * w, c)
            for name in ("q", "k", "v")
        )
        scores = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=jnp.float32) * c**-0.5
        weights = nn.softmax(scores).astype(self.dtype)
        attended = jnp.einsum("bij,bjc->bic", weights, v).reshape(b, h, w, c)
        return x + conv(c, 1, self.dtype, "proj_out")(attended)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 that halves the height and width, and pads only the right and
    the bottom."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(
            x.shape[-1], (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype,
            kernel_init=kernel_init, name="conv",
        )(x)  # fmt: skip


class Upsample(nn.Module):
    """Nearest-neighbor upsampling that doubles the height and width, followed by a 3x3 convolution.

    The layer computes this as four 2x2 convolutions of the small image, one for each parity of row
    and column, because two of the three rows that the kernel covers in the doubled image are the
    same row. The result is the same, with 16/36 of the arithmetic.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        kernel, bias = ConvParameters(c, name="conv")(x)
        x = x.astype(self.dtype)

        def convolve_parity(row: int, column: int) -> jax.Array:
            # Folding before the cast keeps the sums and their gradients in float32.
            folded = fold_taps(fold_taps(kernel, 0, row), 1, column).astype(self.dtype)
            return lax.conv_general_dilated(
                x, folded, (1, 1), ((1 - row, row), (1 - column, column)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip

        rows = [jnp.stack([convolve_parity(i, j) for j in (0, 1)], 3) for i in (0, 1)]
        return (jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, c) + bias).astype(self.dtype)


def fold_taps(kernel: jax.Array, axis: int, parity: int) -> jax.Array:
    """Folds the three taps along a doubled axis into two taps along the original axis. An even
    output (parity 0) reads the previous entry once and the current one twice; an odd output reads
    the current one twice and the next once."""
    first, second, third = (lax.index_in_dim(kernel, i, axis) for i in range(3))
    taps = (first + second, third) if parity else (first, second + third)
    return jnp.concatenate(taps, axis)


class ConvParameters(nn.Module):
    """The kernel [3,3,c,features] and bias of a 3x3 convolution, with the names of `nn.Conv`."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))
