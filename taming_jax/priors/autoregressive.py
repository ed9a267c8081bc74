"""The prior of stage 2: a causal transformer over grids of codes, in raster order.

Its sequence begins with the image's class, or "none", so that the first code is learned as well:
logits at position i are those of code i, given the class and the codes before it. One table embeds
the codes, then the classes, then "none"; the head speaks codes only.
"""

import math
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import Config
from taming_jax.models.layers import Dense, Dtype
from taming_jax.models.quantizers import select

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

    heads: int
    dropout: float
    norm: Literal["layer", "rms"]
    mlp: Literal["gelu", "swiglu"]
    mlp_width: int | None
    bias: bool
    qk_norm: bool
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
            return nn.Dropout(self.dropout)(x, deterministic=not train)

        normed = make_norm(self.norm, self.dtype, "norm1")(x)
        qkv = dense(3 * width, self.bias, self.dtype, "qkv")(normed)
        q, k, v = qkv.reshape(b, t, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        if self.qk_norm:
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
        x = x + dropout(dense(width, self.bias, self.dtype, "projection")(attended))

        normed = make_norm(self.norm, self.dtype, "norm2")(x)
        if self.mlp == "swiglu":
            # Two thirds as wide, so that three matrices hold what two would.
            hidden = self.mlp_width or -(-8 * width // 3 // 8) * 8
            gate = nn.silu(dense(hidden, self.bias, self.dtype, "mlp_gate")(normed))
            h = gate * dense(hidden, self.bias, self.dtype, "mlp_in")(normed)
        else:
            hidden = self.mlp_width or 4 * width
            h = dense(hidden, self.bias, self.dtype, "mlp_in")(normed)
            h = nn.gelu(h, approximate=False)
        return x + dropout(dense(width, self.bias, self.dtype, "mlp_out")(h)), (k, v)


class GPT(nn.Module):
    """Tokens int32 [b,t] to logits float32 [b,t,spoken].

    A token is a code; or a class, `first` and after; or "none", which is the last.
    """

    codebook_size: int
    classes: int
    grid: tuple[int, int]
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_width: int | None = None
    bias: bool = True
    positions: Literal["learned", "rotary", "llamagen"] = "learned"
    block_size: int | None = None
    vocabulary: int | None = None
    first_class: int = 0
    qk_norm: bool = False
    remat: bool = False
    dtype: Dtype = jnp.float32

    @property
    def length(self) -> int:
        """Codes an image has."""
        return self.grid[0] * self.grid[1]

    @property
    def longest(self) -> int:
        """The longest sequence."""
        return self.block_size or self.length

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the largest grid that fits in a sequence, where the image's does not:
        a square."""
        side = math.isqrt(self.longest)
        return self.grid if self.length <= self.longest else (side, side)

    @property
    def first(self) -> int:
        """The token of the first class."""
        return self.codebook_size if self.vocabulary is None else self.first_class

    @property
    def none(self) -> int:
        """The token of no class."""
        return self.vocabulary or self.codebook_size + self.classes

    @property
    def spoken(self) -> int:
        """How many tokens there are logits of: the codes, then those that are none."""
        return self.vocabulary or self.codebook_size

    def class_tokens(self, labels: jax.Array) -> jax.Array:
        """The tokens of classes int [...], from 0; `classes` stands for "none"."""
        return jnp.where(labels == self.classes, self.none, self.first + labels)

    def setup(self) -> None:
        self.embedding = self.param("embedding", init, (self.none + 1, self.width))
        if self.positions == "learned":
            self.learned = self.param("positions", init, (self.longest, self.width))
        block = nn.remat(Block, static_argnums=(5,)) if self.remat else Block
        self.blocks = [
            block(
                self.heads, self.dropout, self.norm, self.mlp, self.mlp_width, self.bias,
                self.qk_norm, self.dtype, name=f"block_{i}",
            )
            for i in range(self.layers)
        ]  # fmt: skip
        self.norm_out = make_norm(self.norm, self.dtype)
        self.head = self.param("head", init, (self.width, self.spoken))
        self.embedding_dropout = nn.Dropout(self.dropout)

    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Logits at every position. In training dropout draws from the "dropout" key."""
        return self._forward(tokens, None, 0, train)[0]

    def decode(
        self, tokens: jax.Array, cache: Cache, position: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        """Logits [b,s,spoken] of tokens [b,s] at `position` and after, which see the earlier
        ones through `cache`; and the cache with theirs."""
        return self._forward(tokens, cache, position, False)

    def _forward(
        self, tokens: jax.Array, cache: Cache | None, position: jax.Array | int, train: bool
    ) -> tuple[jax.Array, Cache]:
        if isinstance(position, int) and position + tokens.shape[1] > self.longest:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the {self.longest} there are")
        x = select(self.embedding, tokens)
        at = position + jnp.arange(tokens.shape[1])
        places = None
        if self.positions == "learned":
            x = x + self.learned[at]
        else:
            # The class stands at row and column 0, the codes' rows and columns count from 1.
            row, column = jnp.divmod(at - 1, self.window[1])
            of_class = 0 if self.positions == "rotary" else -1
            places = jnp.where(at[:, None] > 0, jnp.stack([row, column], -1) + 1, of_class)
        x = self.embedding_dropout(x.astype(self.dtype), deterministic=not train)
        grown: Cache = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, cache[i] if cache is not None else None, position, places, train)
            grown.append(kept)
        x = self.norm_out(x)
        head = self.head.astype(self.dtype)
        return jnp.matmul(x, head, preferred_element_type=jnp.float32), grown

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for sequences of up to `length` tokens."""
        shape = (batch, self.heads, length, self.width // self.heads)
        return [(jnp.zeros(shape, self.dtype),) * 2 for _ in range(self.layers)]


def build_gpt(config: Config, classes: int) -> GPT:
    """The prior that a config describes, for a dataset of so many classes."""
    prior, grid = config.prior, config.grid_size
    return GPT(
        codebook_size=config.vqgan.codes, classes=classes, grid=(grid, grid),
        layers=prior.layers, heads=prior.heads, width=prior.width, dropout=prior.dropout,
        norm=prior.norm, mlp=prior.mlp, mlp_width=prior.mlp_width, bias=prior.bias,
        positions=prior.positions, block_size=prior.block_size, vocabulary=prior.vocabulary,
        first_class=prior.first_class, qk_norm=prior.qk_norm, remat=prior.remat,
        dtype=jnp.dtype(config.dtype),
    )  # fmt: skip


def teacher_forced(model: GPT, labels: jax.Array, codes: jax.Array) -> jax.Array:
    """The tokens [b,t] from which codes int [b,t] are learned: the class, then all codes but the
    last. `labels` int [b] counts from 0; `classes` stands for "none"."""
    return jnp.concatenate([model.class_tokens(labels)[:, None], codes[:, :-1]], 1)


def apply_train(model: GPT, params: Any, tokens: jax.Array, keys: jax.Array) -> jax.Array:
    """Training logits [b,t,k] with a key [b] an example for dropout, so that an example's mask does
    not depend on what else is in the batch, or on which device it is."""
    if not model.dropout:
        return cast(jax.Array, model.apply({"params": params}, tokens))

    def one(tokens: jax.Array, key: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens[None], True, rngs={"dropout": key})[0]

    return jax.vmap(one)(tokens, keys)
