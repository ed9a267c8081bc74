"""The transformer that the priors share, and its parts."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.schema import Config, PriorConfig
from taming_jax.models.layers import Dense, Dtype, float32_einsum
from taming_jax.parallel.devices import (
    get_compute_capability,
    get_default_device,
    resolve_dtype,
)
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
    `coordinates`, [t,2] or [b,t,2], are the rows and columns. d must be a multiple of four.
    """
    quarter = x.shape[-1] // 4
    frequencies = 10_000.0 ** (-jnp.arange(quarter) / quarter)
    angles = coordinates[..., None, :, :, None] * frequencies  # one axis for the heads
    angles = angles.reshape(*angles.shape[:-2], 2 * quarter)
    # Within each half, channel i forms a pair with channel i + d / 4.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, 2, quarter)
    first, second = (halves[..., i, :].reshape(*x.shape[:-1], 2 * quarter) for i in (0, 1))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    rotated = first * cos - second * sin, first * sin + second * cos
    pairs = [part.reshape(*x.shape[:-1], 2, 1, quarter) for part in rotated]
    return jnp.concatenate(pairs, -2).reshape(x.shape).astype(x.dtype)


def supports_cudnn(dtype: Dtype, head_dim: int) -> bool:
    """Returns whether the default device can compute attention with cuDNN, which keeps no attention
    weights in memory."""
    capability = get_compute_capability(get_default_device())
    limit = 256 if capability >= (9, 0) else 128
    fits = head_dim % 8 == 0 and head_dim <= limit
    return dtype == jnp.bfloat16 and capability >= (8, 0) and fits


def attend_with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Returns the attention [b,heads,t,d] of queries to keys and values [b,heads,t,d]: if `causal`,
    to those at their own and earlier positions, else to all."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    return attended.swapaxes(1, 2)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array | int | None,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns the attention [b,heads,t,d] of queries [b,heads,t,d] at the positions from `position`
    on to keys and values [b,heads,s,d] at the positions from 0 on, no later than their own. If
    `position` is None, returns the attention to all keys. `drop` is applied to the weights
    [b,heads,t,s]."""
    scores = float32_einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    if position is not None:
        mask = jnp.arange(k.shape[2]) <= position + jnp.arange(q.shape[2])[:, None]
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bhij,bhjd->bhid", drop(weights), v)


class Block(nn.Module):
    """A pre-norm transformer block: attention and an MLP, each with a residual connection. `index`
    is its number within the network, from 0. If `causal`, a position attends only to itself and to
    earlier ones."""

    settings: PriorConfig
    dtype: Dtype
    index: int
    causal: bool = True

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

        `cache` holds the keys and values of the earlier positions. `coordinates`, [t,2] or [b,t,2],
        are the rows and columns for rotary embeddings; negative coordinates set the query and key
        to zero.
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
            valid = (coordinates >= 0).all(-1)[..., None, :, None]
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
            attended = attend_with_cudnn(q, k, v, self.causal)
        else:
            drop_weights = functools.partial(drop, 0, settings.attention_dropout)
            attended = attend(q, k, v, position if self.causal else None, drop_weights)
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


class Transformer(nn.Module):
    """A transformer over tokens, whose subclasses are the priors.

    A token is a code, a class (from `first_class_token` on), or the null token, which stands for no
    class. Of `settings`, the model ignores those for optimization and for sampling.
    """

    codebook_size: int
    classes: int
    grid: tuple[int, int]
    settings: PriorConfig
    dtype: Dtype = jnp.float32

    causal: ClassVar[bool] = True

    @classmethod
    def build(cls, config: Config, classes: int) -> Self:
        """Builds the prior that a config describes, for a dataset with `classes` classes."""
        grid = config.grid_size, config.grid_size
        dtype = jnp.dtype(resolve_dtype(config.dtype))
        return cls(config.vqgan.codebook_size, classes, grid, config.prior, dtype)

    @property
    def length(self) -> int:
        """The number of codes of a training image."""
        return self.grid[0] * self.grid[1]

    @property
    def window(self) -> tuple[int, int]:
        """The height and width of the grid that the model reads at once."""
        return self.grid

    @property
    def first_class_token(self) -> int:
        """The token of the first class."""
        return self.codebook_size

    @property
    def null_token(self) -> int:
        """The token of images without a class."""
        return self.codebook_size + self.classes

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the embedding table."""
        return self.null_token + 1

    @property
    def num_positions(self) -> int:
        """The number of learned positions."""
        return self.length

    @property
    def num_logits(self) -> int:
        """The number of logits per position: for the codes, then for other tokens, if any."""
        return self.codebook_size

    @property
    def logits_per_image(self) -> int:
        """The number of logits per image that sampling computes at once."""
        return self.num_logits

    def labels_to_tokens(self, labels: jax.Array) -> jax.Array:
        """Returns the tokens of labels int [...], where the label `classes` means no class."""
        return jnp.where(labels == self.classes, self.null_token, self.first_class_token + labels)

    def setup(self) -> None:
        settings, width = self.settings, self.settings.width
        self.embedding = self.param("embedding", init, (self.num_tokens, width))
        if settings.positions == "learned":
            self.position_embedding = self.param("positions", init, (self.num_positions, width))
        block = nn.remat(Block) if settings.remat else Block
        self.blocks = [
            block(settings, self.dtype, i, self.causal, name=f"block_{i}")
            for i in range(settings.layers)
        ]
        self.norm_out = make_norm(settings.norm, self.dtype)
        self.head = self.param("head", init, (width, self.num_logits))

    def locate(self, positions: jax.Array) -> jax.Array:
        """Returns the coordinates int [...,2] for rotary embeddings. Position 0 holds the class,
        and position i the code i - 1 of the window in raster order."""
        # Rows and columns of codes start at 1. The class has 0, or -1 in LlamaGen's positions.
        row, column = jnp.divmod(positions - 1, self.window[1])
        code_coordinates = jnp.stack([row, column], -1) + 1
        class_coordinate = 0 if self.settings.positions == "rotary" else -1
        return jnp.where(positions[..., None] > 0, code_coordinates, class_coordinate)

    def run_blocks(
        self,
        x: jax.Array,
        coordinates: jax.Array | None,
        keys: jax.Array | None,
        cache: Cache | None = None,
        position: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Returns the logits [b,t,num_logits] for embeddings [b,t,width], and the updated cache.
        See `Block` for the arguments."""
        x = dropout(x.astype(self.dtype), self.settings.dropout, keys, 0)
        new_cache: Cache = []
        for i, block in enumerate(self.blocks):
            layer_cache = cache[i] if cache is not None else None
            x, layer_cache = block(x, layer_cache, position, coordinates, keys)
            new_cache.append(layer_cache)
        head = self.head.astype(self.dtype)
        return float32_einsum("btw,wk->btk", self.norm_out(x), head), new_cache

    @nn.nowrap
    def train_logits(
        self, params: Any, tokens: jax.Array, keys: jax.Array, *arguments: Any
    ) -> jax.Array:
        """Returns the logits [b,t,num_logits] for tokens [b,t] with dropout, which uses one key per
        example in `keys` [b]. `arguments` are further arguments of the model."""
        words = jax.random.key_data(keys)[:, :2]
        return cast(jax.Array, self.apply({"params": params}, tokens, words, *arguments))

    @nn.nowrap
    def check_trainable(self) -> None:
        """Raises UserError if this prior cannot be trained."""

    @nn.nowrap
    def check_likelihood(self, grid: tuple[int, int]) -> None:
        """Raises UserError if `log_likelihood` is not defined for grids of codes of this size."""

    @nn.nowrap
    def check_drawing(self, grid: tuple[int, int], known: Any) -> None:
        """Raises UserError if `sample` cannot draw grids of this size with these known codes, int
        [n,p] in raster order, -1 for codes to sample."""
