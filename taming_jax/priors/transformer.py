"""The blocks of the priors' transformers: norms, rotary positions, attention with a cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import PriorConfig
from taming_jax.models.layers import Dense, Dtype

# Keys and values of each layer, [b, heads, t, width / heads] each.
Cache = list[tuple[jax.Array, jax.Array]]
init = nn.initializers.normal(0.02)  # GPT-2's


class RMSNorm(nn.Module):
    """Scales to root mean square one (arXiv 1910.07467); statistics in float32."""

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * (inverse * scale)).astype(self.dtype)


def make_norm(kind: str, dtype: Dtype, name: str | None = None) -> nn.Module:
    """LayerNorm with PyTorch's epsilon, or RMSNorm."""
    if kind == "rms":
        return RMSNorm(dtype, name=name)
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


def dense(features: int, bias: bool, dtype: Dtype, name: str) -> Dense:
    return Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, name=name)


def rotate(x: jax.Array, places: jax.Array) -> jax.Array:
    """Rotary positions in two dimensions (arXiv 2104.09864): of a head's channels [b,heads,t,d],
    the first half turns with the row, the second with the column; `places` [t,2]. d is a multiple
    of four."""
    quarter = x.shape[-1] // 4
    frequencies = 10_000.0 ** (-jnp.arange(quarter) / quarter)
    angles = (places[:, :, None] * frequencies).reshape(len(places), 2 * quarter)
    # The channels pair up across the halves of each half.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, 2, quarter)
    first, second = (halves[..., i, :].reshape(*x.shape[:-1], 2 * quarter) for i in (0, 1))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = first * cos - second * sin, first * sin + second * cos
    pairs = [part.reshape(*x.shape[:-1], 2, 1, quarter) for part in turned]
    return jnp.concatenate(pairs, -2).reshape(x.shape).astype(x.dtype)


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm and beside a shortcut."""

    settings: PriorConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        position: jax.Array | int,
        places: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x [b,t,width] at positions `position` ... with the keys and values of those before them
        in `cache`; `places` [t,2] are their rows and columns where positions are rotary, negative
        where there is nothing to attend with."""
        b, t, width = x.shape

        def dropout(x: jax.Array) -> jax.Array:
            return nn.Dropout(self.settings.dropout)(x, deterministic=not train)

        normed = make_norm(self.settings.norm, self.dtype, "norm1")(x)
        qkv = dense(3 * width, self.settings.bias, self.dtype, "qkv")(normed)
        q, k, v = qkv.reshape(b, t, 3, self.settings.heads, -1).transpose(2, 0, 3, 1, 4)
        if self.settings.qk_norm:
            q = RMSNorm(self.dtype, name="query_norm")(q)
            k = RMSNorm(self.dtype, name="key_norm")(k)
        if places is not None:
            placed = (places >= 0).all(-1, keepdims=True)
            q, k = (jnp.where(placed, rotate(x, places), 0) for x in (q, k))
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, position, 2)
                for old, new in zip(cache, (k, v), strict=True)
            )
        scores = jnp.einsum("bhid,bhjd->bhij", q, k, preferred_element_type=jnp.float32)
        scores *= q.shape[-1] ** -0.5
        seen = jnp.arange(k.shape[2]) <= position + jnp.arange(t)[:, None]
        weights = nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(self.dtype)
        attended = jnp.einsum("bhij,bhjd->bhid", dropout(weights), v)
        attended = attended.transpose(0, 2, 1, 3).reshape(b, t, width)
        x = x + dropout(dense(width, self.settings.bias, self.dtype, "projection")(attended))

        normed = make_norm(self.settings.norm, self.dtype, "norm2")(x)
        if self.settings.mlp == "swiglu":
            # Two thirds as wide, so that three matrices hold what two would.
            hidden = self.settings.mlp_width or -(-8 * width // 3 // 8) * 8
            gate = nn.silu(dense(hidden, self.settings.bias, self.dtype, "mlp_gate")(normed))
            h = gate * dense(hidden, self.settings.bias, self.dtype, "mlp_in")(normed)
        else:
            hidden = self.settings.mlp_width or 4 * width
            h = dense(hidden, self.settings.bias, self.dtype, "mlp_in")(normed)
            h = nn.gelu(h, approximate=False)
        return x + dropout(dense(width, self.settings.bias, self.dtype, "mlp_out")(h)), (k, v)
