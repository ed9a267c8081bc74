"""Other ways to compute some layers, as candidates for the networks.

Each entry times the forward and the backward pass of a layer in bfloat16, at the sizes of a preset.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.cli.report.timing import Entry, Job, require_gpu, time_calls
from taming_jax.config.schema import Config
from taming_jax.models.layers import Upsample
from taming_jax.models.lpips import max_pool
from taming_jax.priors.transformer import attend

DTYPE = jnp.bfloat16
Shape = tuple[int, ...]


def convolve(x: jax.Array, kernel: jax.Array, **settings: Any) -> jax.Array:
    """Convolves x [b,h,w,c] with a kernel [i,j,c,features], by default with "SAME" padding."""
    settings = {"window_strides": (1, 1), "padding": "SAME"} | settings
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )


def pad_input(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Like `convolve`, with the channels of the input padded to 8."""
    missing = 8 - x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return convolve(x, jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0))))


def pad_output(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Like `convolve`, with the channels of the output padded to 8 and sliced."""
    features = kernel.shape[-1]
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, 8 - features)))
    return convolve(x, kernel)[..., :features]


def upsample_by_parity(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The layer of the package, without bias."""
    params = {"conv": {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}}
    return cast(jax.Array, Upsample(x.dtype).apply({"params": params}, x))


def upsample_by_repeating(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest-neighbor resize, then the convolution."""
    return convolve(x.repeat(2, 1).repeat(2, 2), kernel)


def upsample_by_dilation(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One transposed convolution, whose 4x4 kernel is the convolution of the 3x3 kernel with the
    2x2 window that a pixel of the small image fills."""
    for axis in (0, 1):
        before, after = ([(0, 0)] * 4 for _ in range(2))
        before[axis], after[axis] = (1, 0), (0, 1)
        kernel = jnp.pad(kernel, before) + jnp.pad(kernel, after)
    return convolve(x, kernel, padding=((2, 2), (2, 2)), lhs_dilation=(2, 2))


def pool_by_window(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def attend_plainly(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The attention of the package, for q, k and v [b,t,heads,d]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return attend(q, k, v, 0, lambda weights: weights).swapaxes(1, 2)


def attend_by_library(implementation: Any) -> Callable[..., jax.Array]:
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )


def list_layers(config: Config) -> Iterator[tuple[str, dict[str, Callable], list[Shape], int]]:
    """Yields each layer: its name, the ways to compute it by name, the shapes of its arguments
    (kernels, which stay float32, are those of odd height), and the number of the first argument
    that needs a gradient."""
    data, vqgan, prior = config.data, config.vqgan, config.prior
    b, size, c = vqgan.batch_size, data.image_size, vqgan.channels
    convolutions = {"plain": convolve, "input padded to 8": pad_input}
    images, kernel = (b, size, size, data.channels), (3, 3, data.channels, c)
    yield "first convolution", convolutions, [images, kernel], 1
    convolutions = {"plain": convolve, "output padded to 8": pad_output}
    hidden, kernel = (b, size, size, c), (3, 3, c, data.channels)
    yield "last convolution", convolutions, [hidden, kernel], 0
    upsampling: dict[str, Callable] = {
        "four parity convolutions": upsample_by_parity, "nearest and convolution":
        upsample_by_repeating, "one transposed convolution": upsample_by_dilation,
    }  # fmt: skip
    for level in (1, len(vqgan.multipliers) - 1):
        height, channels = size // 2**level, c * vqgan.multipliers[level]
        shapes: list[Shape] = [(b, height, height, channels), (3, 3, channels, channels)]
        yield "upsampling", upsampling, shapes, 0
    pooling: dict[str, Callable] = {"reduce_window": pool_by_window, "reshape": max_pool}
    yield "max pooling", pooling, [(b, size, size, 64)], 0
    attention: dict[str, Callable] = {"plain": attend_plainly} | {
        name: attend_by_library(name) for name in ("xla", "cudnn")
    }
    tokens = (prior.batch_size, config.grid_size**2, prior.heads, prior.width // prior.heads)
    yield "causal attention", attention, [tokens] * 3, 0


def run_layers(job: Job, preset: str) -> Iterator[Entry]:
    """The row of all layers."""
    require_gpu(job, jax.default_backend() != "cpu")
    for name, ways, shapes, first in list_layers(job.load_config(preset, {"dtype": "bfloat16"})):
        for way, function in ways.items():
            label = f"{name} {'x'.join(map(str, shapes[0]))}, {way}"
            try:
                yield label, time_layer(function, shapes, first, job.steps)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                yield label, {"reason": str(error).splitlines()[0][:200]}


def time_layer(function: Callable, shapes: list[Shape], first: int, steps: int) -> dict[str, float]:
    """Times a layer and the gradients of its arguments from number `first` on."""
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    arguments = [
        jax.random.normal(key, shape, jnp.float32 if shape[0] == 3 else DTYPE)
        for key, shape in zip(keys, shapes, strict=False)
    ]
    output = jax.eval_shape(function, *arguments)
    cotangent = jax.random.normal(keys[-1], output.shape, output.dtype)

    @jax.jit
    def compute(arguments: list[jax.Array], cotangent: jax.Array) -> Any:
        output, pullback = jax.vjp(
            lambda *rest: function(*arguments[:first], *rest), *arguments[first:]
        )
        return output, pullback(cotangent)

    return time_calls(lambda: compute(arguments, cotangent), steps)
