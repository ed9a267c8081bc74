"""The building blocks of the prior: norms, rotary embeddings, and attention with a KV cache."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import PriorConfig
from taming_jax.models.layers import Dense, Dtype, float32_einsum
from taming_jax.parallel.devices import get_compute_capability, get_default_device
from taming_jax.priors.dropout import dropout

# The keys and values of each layer, [b, heads, t, width / heads] each.
Cache = list[tuple[jax.Array, jax.Array]]
init = nn.initializers.normal(0.02)  # as in GPT-2


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv 1910.07467), with statistics in float32."""

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * (inverse_rms * scale)).astype(self.dtype)


def make_norm(kind: str, dtype: Dtype, name: str | None = None) -> nn.Module:
    """Returns an RMSNorm if `kind` is "rms", else a LayerNorm with PyTorch's default epsilon."""
    if kind == "rms":
        return RMSNorm(dtype, name=name)
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


def dense(features: int, bias: bool, dtype: Dtype, name: str) -> Dense:
    """Returns a dense layer with the initializer of GPT-2."""
    return Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, name=name)


def rotate(x: jax.Array, coordinates: jax.Array) -> jax.Array:
    """Applies 2D rotary embeddings (arXiv 2104.09864) to queries or keys [b,heads,t,d].

    The first half of the channels rotates by the row, and the second half by the column.
    `coordinates` [t,2] are the rows and columns. d must be a multiple of four.
    """
    quarter = x.shape[-1] // 4
    frequencies = 10_000.0 ** (-jnp.arange(quarter) / quarter)
    angles = (coordinates[:, :, None] * frequencies).reshape(len(coordinates), 2 * quarter)
    # Within each half, channel i forms a pair with channel i + d / 4.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, 2, quarter)
    first, second = (halves[..., i, :].reshape(*x.shape[:-1], 2 * quarter) for i in (0, 1))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    rotated = first * cos - second * sin, first * sin + second * cos
    pairs = [part.reshape(*x.shape[:-1], 2, 1, quarter) for part in rotated]
    return jnp.concatenate(pairs, -2).reshape(x.shape).astype(x.dtype)


def supports_cudnn(dtype: Dtype, head_dim: int) -> bool:
    """Returns whether the default device can compute causal attention with cuDNN, which keeps no
    attention weights in memory."""
    capability = get_compute_capability(get_default_device())
    limit = 256 if capability >= (9, 0) else 128
    fits = head_dim % 8 == 0 and head_dim <= limit
    return dtype == jnp.bfloat16 and capability >= (8, 0) and fits


def attend_with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns the attention [b,heads,t,d] of queries to keys and values [b,heads,t,d] at their own
    and earlier positions."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return attended.swapaxes(1, 2)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array | int,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns the attention [b,heads,t,d] of queries [b,heads,t,d] at the positions from `position`
    on to keys and values [b,heads,s,d] at the positions from 0 on, no later than their own. `drop`
    is applied to the weights [b,heads,t,s]."""
    scores = float32_einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    mask = jnp.arange(k.shape[2]) <= position + jnp.arange(q.shape[2])[:, None]
    weights = nn.softmax(jnp.where(mask, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("bhij,bhjd->bhid", drop(weights), v)


class Block(nn.Module):
    """A pre-norm transformer block: attention and an MLP, each with a residual connection. `index`
    is its number within the network, from 0."""

    settings: PriorConfig
    dtype: Dtype
    index: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        position: jax.Array | int,
        coordinates: jax.Array | None,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Applies the block to x [b,t,width] at the positions from `position` on.

        `cache` holds the keys and values of the earlier positions. `coordinates` [t,2] are the rows
        and columns for rotary embeddings; negative coordinates set the query and key to zero.
        `keys` uint32 [b,2] are the keys for dropout, or None outside training.
        Returns the output and the updated cache or, without a cache, the keys and values of x.
        """
        (b, t, width), settings = x.shape, self.settings

        def drop(layer: int, rate: float, x: jax.Array) -> jax.Array:
            # Layer 0 is the embedding.
            return dropout(x, rate, keys, 1 + 3 * self.index + layer)

        normalized = make_norm(settings.norm, self.dtype, "norm1")(x)
        qkv = dense(3 * width, settings.bias, self.dtype, "qkv")(normalized)
        q, k, v = qkv.reshape(b, t, 3, settings.heads, -1).transpose(2, 0, 3, 1, 4)
        if settings.qk_norm:
            q = RMSNorm(self.dtype, name="query_norm")(q)
            k = RMSNorm(self.dtype, name="key_norm")(k)
        if coordinates is not None:
            valid = (coordinates >= 0).all(-1, keepdims=True)
            q, k = (jnp.where(valid, rotate(x, coordinates), 0) for x in (q, k))
        if cache is not None:
            # Without the barrier, XLA may update the cache once in place and again inside of an
            # operation that reads it. For that, it copies the old cache at every position.
            k, v = jax.lax.optimization_barrier(
                tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, new, position, 2)
                    for old, new in zip(cache, (k, v), strict=True)
                )
            )
        drops_weights = keys is not None and settings.attention_dropout > 0
        if cache is None and not drops_weights and supports_cudnn(self.dtype, q.shape[-1]):
            attended = attend_with_cudnn(q, k, v)
        else:
            drop_weights = functools.partial(drop, 0, settings.attention_dropout)
            attended = attend(q, k, v, position, drop_weights)
        attended = attended.transpose(0, 2, 1, 3).reshape(b, t, width)
        h = dense(width, settings.bias, self.dtype, "projection")(attended)
        x = x + drop(1, settings.dropout, h)

        normalized = make_norm(settings.norm, self.dtype, "norm2")(x)
        if settings.mlp == "swiglu":
            # With two thirds of the usual hidden width, the three matrices have as many parameters
            # as the usual two.
            hidden = settings.mlp_width or -(-8 * width // 3 // 8) * 8
            gate = nn.silu(dense(hidden, settings.bias, self.dtype, "mlp_gate")(normalized))
            h = gate * dense(hidden, settings.bias, self.dtype, "mlp_in")(normalized)
        else:
            hidden = settings.mlp_width or 4 * width
            h = dense(hidden, settings.bias, self.dtype, "mlp_in")(normalized)
            h = nn.gelu(h, approximate=False)
        h = dense(width, settings.bias, self.dtype, "mlp_out")(h)
        return x + drop(2, settings.dropout, h), (k, v)
