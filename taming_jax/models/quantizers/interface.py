"""The interface of quantizers, and what several of them share."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.config.schema import VQGANConfig


class Quantized(NamedTuple):
    """The output of a quantizer for latents z [b,h,w,d].

    vectors: the codes, float32 [b,h,w,d], with a gradient to z.
    indices: int32 [b,h,w], in raster order.
    loss: the quantizer's loss at each position, float32 [b,h,w].
    statistics: in training, the sums over the latents that `Quantizer.update` requires, or None.
    """

    vectors: jax.Array
    indices: jax.Array
    loss: jax.Array
    statistics: dict[str, jax.Array] | None = None


class Training(NamedTuple):
    """The inputs that a quantizer has only in training.

    keys: one random key per image [b].
    place: the position of each image in the global batch, int32 [b].
    step_key: a random key for the whole step.
    progress: the fraction of the run that is done, float32 [].
    """

    keys: jax.Array
    place: jax.Array
    step_key: jax.Array
    progress: jax.Array


class Quantizer(nn.Module):
    """The base class of quantizers, which are listed in `QUANTIZERS`. `axis_name` is the mapped
    axis of devices in training, or None."""

    settings: VQGANConfig
    axis_name: str | None = None

    @property
    def options(self) -> Any:
        """The quantizer's own settings, a dataclass of config/quantizers.py."""
        return getattr(self.settings, self.settings.quantizer)

    @property
    def num_codes(self) -> int:
        """The number of codes, which must equal `codebook_size` (see models/vqgan.py)."""
        return self.settings.codebook_size

    @property
    def code_dim(self) -> int:
        """The dimension of latents and codes."""
        return self.settings.code_dim

    def __call__(self, z: jax.Array, training: Training | None = None) -> Quantized:
        """Quantizes latents float [b,h,w,d]. Without `training`, the result does not depend on
        anything random or on other images."""
        raise NotImplementedError

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Returns the codes float32 [b,h,w,d] for indices int32 [b,h,w]."""
        raise NotImplementedError

    def init_state(self) -> dict[str, jax.Array]:
        """Returns the initial state that `update` changes. Most quantizers have none."""
        return {}

    def update(
        self, params: Any, state: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Returns the quantizer's parameters and state after a step. `params` are those after the
        optimizer's step, and `statistics` are summed over the global batch."""
        return params, state


def mean_square(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean squared difference of vectors [...,d]."""
    return jnp.square(x - y).mean(-1)


def straight_through(z: jax.Array, vectors: jax.Array) -> jax.Array:
    """Returns the values of `vectors` with a gradient as if they were z."""
    return z + lax.stop_gradient(vectors - z)


def rotate(z: jax.Array, vectors: jax.Array) -> jax.Array:
    """Returns the values of `vectors` [...,d] as if z [...,d] had been rotated and scaled to them,
    by a transformation that is constant in the backward pass (the rotation trick, arXiv
    2410.06424). The gradient keeps its angle to the vector that it belongs to, and is multiplied by
    |vectors| / |z|."""
    fixed_z, fixed = lax.stop_gradient(z), lax.stop_gradient(vectors)
    start, end = l2_normalize(fixed_z), l2_normalize(fixed)
    middle = l2_normalize(start + end)
    scale = jnp.sqrt(jnp.square(fixed).sum(-1, keepdims=True)) * lax.rsqrt(
        jnp.square(fixed_z).sum(-1, keepdims=True) + 1e-12
    )

    def project(direction: jax.Array) -> jax.Array:
        return (z * direction).sum(-1, keepdims=True)

    # The product of two reflections: at the plane of `middle`, and at that of `end`.
    rotated = scale * (z - 2 * project(middle) * middle + 2 * project(start) * end)
    return fixed + rotated - lax.stop_gradient(rotated)


def draw_latents(z: jax.Array, training: Training, count: int, batch_size: int) -> jax.Array:
    """Returns `count` latents [count,d], drawn at random from those of the global batch of
    `batch_size` images, without repetition as far as possible. `z` [b,h,w,d] are those of this
    device or micro-batch; the result is zero for latents elsewhere, so that a sum over devices and
    micro-batches yields all."""
    b, h, w, d = z.shape
    chosen = jax.random.permutation(training.step_key, batch_size * h * w)
    chosen = chosen[jnp.arange(count) % len(chosen)]
    matches = chosen[:, None] // (h * w) == training.place  # [count,b]
    latents = z.reshape(b, h * w, d)[jnp.argmax(matches, -1), chosen % (h * w)]
    return jnp.where(matches.any(-1, keepdims=True), latents, 0)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scales vectors [..., d] to unit length. The constant keeps the gradient finite at zero."""
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
