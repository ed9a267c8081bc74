"""The building blocks of the prior: norms, rotary embeddings, and attention with a KV cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import PriorConfig
from taming_jax.models.layers import Dense, Dtype

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


class Block(nn.Module):
    """A pre-norm transformer block: attention and an MLP, each with a residual connection."""

    settings: PriorConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        position: jax.Array | int,
        coordinates: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Applies the block to x [b,t,width] at the positions from `position` on.

        `cache` holds the keys and values of the earlier positions. `coordinates` [t,2] are the rows
        and columns for rotary embeddings; negative coordinates set the query and key to zero.
        Returns the output and the updated cache or, without a cache, the keys and values of x.
        """
        b, t, width = x.shape

        def dropout(x: jax.Array) -> jax.Array:
            return nn.Dropout(self.settings.dropout)(x, deterministic=not train)

        normalized = make_norm(self.settings.norm, self.dtype, "norm1")(x)
        qkv = dense(3 * width, self.settings.bias, self.dtype, "qkv")(normalized)
        q, k, v = qkv.reshape(b, t, 3, self.settings.heads, -1).transpose(2, 0, 3, 1, 4)
        if self.settings.qk_norm:
            q = RMSNorm(self.dtype, name="query_norm")(q)
            k = RMSNorm(self.dtype, name="key_norm")(k)
        if coordinates is not None:
            valid = (coordinates >= 0).all(-1, keepdims=True)
            q, k = (jnp.where(valid, rotate(x, coordinates), 0) for x in (q, k))
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, position, 2)
                for old, new in zip(cache, (k, v), strict=True)
            )
        scores = jnp.einsum("bhid,bhjd->bhij", q, k, preferred_element_type=jnp.float32)
        scores *= q.shape[-1] ** -0.5
        mask = jnp.arange(k.shape[2]) <= position + jnp.arange(t)[:, None]
        weights = nn.softmax(jnp.where(mask, scores, -jnp.inf)).astype(self.dtype)
        attended = jnp.einsum("bhij,bhjd->bhid", dropout(weights), v)
        attended = attended.transpose(0, 2, 1, 3).reshape(b, t, width)
        x = x + dropout(dense(width, self.settings.bias, self.dtype, "projection")(attended))

        normalized = make_norm(self.settings.norm, self.dtype, "norm2")(x)
        if self.settings.mlp == "swiglu":
            # With two thirds of the usual hidden width, the three matrices have as many parameters
            # as the usual two.
            hidden = self.settings.mlp_width or -(-8 * width // 3 // 8) * 8
            gate = nn.silu(dense(hidden, self.settings.bias, self.dtype, "mlp_gate")(normalized))
            h = gate * dense(hidden, self.settings.bias, self.dtype, "mlp_in")(normalized)
        else:
            hidden = self.settings.mlp_width or 4 * width
            h = dense(hidden, self.settings.bias, self.dtype, "mlp_in")(normalized)
            h = nn.gelu(h, approximate=False)
        return x + dropout(dense(width, self.settings.bias, self.dtype, "mlp_out")(h)), (k, v)
