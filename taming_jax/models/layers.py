"""The building blocks of the VQ-GAN, with the arithmetic of the official code ("Taming
Transformers", arXiv 2012.09841). Images are [b,h,w,c] and parameters float32; `dtype` is the dtype
of the computation.
"""

import functools
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_einsum(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Computes an einsum of two arrays of one dtype, with a float32 result.

    The gradient rounds the cotangent to the dtype of the arrays. JAX would multiply the float32
    cotangent instead, and so compute the products of the backward pass in float32.
    """
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _float32_einsum_forward(
    subscripts: str, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return float32_einsum(subscripts, left, right), (left, right)


def _float32_einsum_backward(
    subscripts: str, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pullback = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    return pullback(cotangent.astype(operands[0].dtype))


float32_einsum.defvjp(_float32_einsum_forward, _float32_einsum_backward)


def conv(features: int, size: int, dtype: Dtype, name: str | None = None) -> Conv:
    """Returns a convolution that keeps the height and width."""
    padding = size // 2
    return Conv(
        features, (size, size), padding=padding, dtype=dtype, kernel_init=kernel_init, name=name
    )


def count_groups(channels: int) -> int:
    """Returns the number of groups of a normalization: the largest number up to 32 that divides the
    number of channels. In the official models it is 32."""
    return next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)


class GroupNorm(nn.Module):
    """Group normalization of [b,h,w,c], optionally followed by SiLU, with statistics in float32."""

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6  # as in the official code; PyTorch's default is 1e-5
    silu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        return group_norm(
            count_groups(c), self.epsilon, self.silu, x.astype(self.dtype), scale, bias
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def group_norm(
    groups: int, epsilon: float, silu: bool, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Normalizes x [b,h,w,c] over each of `groups` groups of channels, multiplies by `scale` [c],
    adds `bias` [c], and applies SiLU if `silu` is true. Returns the dtype of x.

    The gradient is written out because it needs only x and the statistics of its groups. Automatic
    differentiation would keep several float32 arrays of the size of x for each layer.
    """
    return _group_norm_forward(groups, epsilon, silu, x, scale, bias)[0]


def _group_norm_forward(
    groups: int, epsilon: float, silu: bool, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, Any]:
    x32 = x.astype(jnp.float32)
    mean = average_groups(x32, groups)
    inverse_std = lax.rsqrt(average_groups(jnp.square(x32 - mean), groups) + epsilon)
    y = (x32 - mean) * (inverse_std * scale) + bias
    y = nn.silu(y) if silu else y
    return y.astype(x.dtype), (x, mean, inverse_std, scale, bias)


def _group_norm_backward(
    groups: int, epsilon: float, silu: bool, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse_std, scale, bias = residuals
    normalized = (x.astype(jnp.float32) - mean) * inverse_std
    cotangent = cotangent.astype(jnp.float32)
    if silu:
        y = normalized * scale + bias
        sigmoid = nn.sigmoid(y)
        cotangent = cotangent * sigmoid * (1 + y * (1 - sigmoid))
    # Both sums per image and channel serve the parameters and, averaged over groups, x.
    sums = cotangent.sum((1, 2)), (cotangent * normalized).sum((1, 2))
    pixels = x.shape[1] * x.shape[2]
    mean_cotangent, mean_product = (
        average_channels(scale * total / pixels, groups)[:, None, None] for total in sums
    )
    gradient = inverse_std * (cotangent * scale - mean_cotangent - normalized * mean_product)
    return gradient.astype(x.dtype), sums[1].sum(0), sums[0].sum(0)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def average_groups(x: jax.Array, groups: int) -> jax.Array:
    """Averages x [b,h,w,c] over space and over each group of channels. Returns [b,1,1,c].

    It averages over space first, because XLA's CPU code is slow at reductions whose last axis has
    one or two channels.
    """
    return average_channels(x.mean((1, 2)), groups)[:, None, None]


def average_channels(x: jax.Array, groups: int) -> jax.Array:
    """Averages x [b,c] over each group of channels. Returns [b,c]."""
    b, c = x.shape
    return jnp.repeat(x.reshape(b, groups, c // groups).mean(-1), c // groups, -1)


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
            mean = x.mean((0, 1, 2))
            var = jnp.square(x - mean).mean((0, 1, 2))
            if axis is not None:
                mean, var = combine_moments(mean, var, axis)
            if not self.is_initializing():
                n = x.size // c * (1 if axis is None else lax.axis_size(axis))
                keep = 1 - self.momentum
                running_mean.value = keep * running_mean.value + self.momentum * mean
                running_var.value = keep * running_var.value + self.momentum * var * n / (n - 1)
        else:
            mean, var = running_mean.value, running_var.value
        return ((x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias).astype(self.dtype)


def combine_moments(mean: jax.Array, var: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and variance [c] over all devices from those of each device, each of which
    holds the same number of values. The devices communicate once."""
    means, variances = lax.all_gather(jnp.stack([mean, var]), axis_name, axis=1)
    total = means.mean(0)
    return total, (variances + jnp.square(means - total)).mean(0)


def init_batch_norm_scale(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializes the scale of a BatchNorm as pix2pix does."""
    return 1 + 0.02 * jax.random.normal(key, shape)


class ResidualBlock(nn.Module):
    """A residual block of two normalized 3x3 convolutions, from [b,h,w,c] to [b,h,w,features]."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = GroupNorm(self.dtype, silu=True, name="norm1")(x)
        h = conv(self.features, 3, self.dtype, "conv1")(h)
        h = GroupNorm(self.dtype, silu=True, name="norm2")(h)
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
        scores = float32_einsum("bic,bjc->bij", q, k) * c**-0.5
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
