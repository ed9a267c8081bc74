"""The blocks of the VQ-GAN's networks, with the arithmetic of the official code ("Taming
Transformers", arXiv 2012.09841): images are [b,h,w,c], parameters float32, `dtype` is what is
computed in.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Dtype = Any
# The spread PyTorch gives a convolution's kernel, from which the official models start:
# uniform within 1 / sqrt(fan in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_apart(
    inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: Dtype
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What a layer multiplies in `dtype`, and its bias as it is."""
    return inputs.astype(dtype), kernel.astype(dtype), bias


class Conv(nn.Conv):
    """A convolution that adds its bias in float32. The bias's gradient is a sum over all places of
    all images, which would otherwise be taken in bfloat16, and lose most of it."""

    promote_dtype: Any = bias_apart

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs).astype(self.dtype)


class Dense(nn.Dense):
    """A dense layer of the same kind."""

    promote_dtype: Any = bias_apart

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs).astype(self.dtype)


def conv(features: int, size: int, dtype: Dtype, name: str | None = None) -> Conv:
    """A convolution that keeps height and width."""
    pad = size // 2
    return Conv(
        features, (size, size), padding=pad, dtype=dtype, kernel_init=kernel_init, name=name
    )


class GroupNorm(nn.Module):
    """Normalises over height, width and the channels of a group [b,h,w,c]; statistics in float32.

    At most 32 groups: the largest number that divides the channels, as 32 does in the official
    models. Channels are summed over space before they are grouped, since XLA's CPU code is slow at
    reductions that end in an axis of one or two channels.
    """

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6  # the official code's, not PyTorch's default

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
        centred = x - group_mean(x)
        inverse = lax.rsqrt(group_mean(jnp.square(centred)) + self.epsilon)
        return (centred * (inverse * scale) + bias).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over b, h and w, and over the devices of `axis_name`, as PyTorch's
    BatchNorm2d: the running variance is the unbiased one (flax's own keeps the biased)."""

    dtype: Dtype = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        scale = self.param("scale", normal_about_one, (c,))
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


def normal_about_one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """pix2pix's start of a BatchNorm's scale."""
    return 1 + 0.02 * jax.random.normal(key, shape)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, [b,h,w,c] to [b,h,w,features]."""

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
    """One head of self-attention over all places of an image, beside a shortcut."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        normed = GroupNorm(self.dtype, name="norm")(x).reshape(b, h * w, 1, c)
        q, k, v = (
            conv(c, 1, self.dtype, name)(normed).reshape(b, h * w, c) for name in ("q", "k", "v")
        )
        scores = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=jnp.float32) * c**-0.5
        weights = nn.softmax(scores).astype(self.dtype)
        attended = jnp.einsum("bij,bjc->bic", weights, v).reshape(b, h, w, c)
        return x + conv(c, 1, self.dtype, "proj_out")(attended)


class Downsample(nn.Module):
    """Half the height and width by a 3x3 convolution of stride 2, padded right and below only."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(
            x.shape[-1], (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype,
            kernel_init=kernel_init, name="conv",
        )(x)  # fmt: skip


class Upsample(nn.Module):
    """Twice the height and width: nearest-neighbour doubling, then a 3x3 convolution.

    Computed as four 2x2 convolutions of the small image, one for each parity of row and column:
    of the three rows that a kernel sees of the doubled image, two are the same row. 16/36 of the
    arithmetic and the same numbers.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        kernel, bias = ConvParameters(c, name="conv")(x)
        x = x.astype(self.dtype)

        def parity(row: int, column: int) -> jax.Array:
            # Folded in float32, so that the sums, and those of the gradients, are.
            small = fold(fold(kernel, 0, row), 1, column).astype(self.dtype)
            return lax.conv_general_dilated(
                x, small, (1, 1), ((1 - row, row), (1 - column, column)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip

        rows = [jnp.stack([parity(row, 0), parity(row, 1)], 3) for row in (0, 1)]
        return (jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, c) + bias).astype(self.dtype)


def fold(kernel: jax.Array, axis: int, parity: int) -> jax.Array:
    """Three taps on a doubled axis as two on the small one: an even output sees the entry before
    its own once and its own twice, an odd one its own twice and the next once."""
    first, second, third = (lax.index_in_dim(kernel, i, axis) for i in range(3))
    taps = (first + second, third) if parity else (first, second + third)
    return jnp.concatenate(taps, axis)


class ConvParameters(nn.Module):
    """The kernel [3,3,c,features] and bias of a 3x3 convolution, under the names nn.Conv gives."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))
