"""The autoregressive prior: a causal transformer over grids of codes, in raster order.

Its sequence begins with the image's class, or "none", so that the first code is learned as well:
logits at position i are those of code i, given the class and the codes before it. One table embeds
the codes, then the classes, then "none"; the head predicts codes only.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.config.schema import Config, PriorConfig
from taming_jax.errors import UserError
from taming_jax.losses import next_token, per_example
from taming_jax.models.layers import Dtype
from taming_jax.models.quantizers import one_hot_lookup
from taming_jax.priors.decoding import (
    Choose,
    Inputs,
    apply_guidance,
    token_choice,
    with_unconditional,
)
from taming_jax.priors.transformer import Block, Cache, init, make_norm
from taming_jax.priors.windows import scan_windows


class GPT(nn.Module):
    """Tokens int32 [b,t] to logits float32 [b,t,num_logits].

    A token is a code; or a class, `first` and after; or "none", which is the last. The network
    reads only its own part of `settings`, not how it is trained.
    """

    codebook_size: int
    classes: int
    grid: tuple[int, int]
    settings: PriorConfig
    dtype: Dtype = jnp.float32

    @classmethod
    def build(cls, config: Config, classes: int) -> "GPT":
        """The prior that a config describes, for a dataset with that many classes."""
        grid = config.grid_size, config.grid_size
        dtype = jnp.dtype(config.dtype)
        return cls(config.vqgan.codebook_size, classes, grid, config.prior, dtype)

    @property
    def length(self) -> int:
        """Codes an image has."""
        return self.grid[0] * self.grid[1]

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return self.settings.block_size or self.length

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the largest grid that fits in a sequence, where the image's does not:
        a square."""
        side = math.isqrt(self.max_length)
        return self.grid if self.length <= self.max_length else (side, side)

    @property
    def first_class_token(self) -> int:
        """The token of the first class."""
        return self.codebook_size if self.settings.vocabulary is None else self.settings.first_class

    @property
    def null_token(self) -> int:
        """The token of no class."""
        return self.settings.vocabulary or self.codebook_size + self.classes

    @property
    def num_logits(self) -> int:
        """How many tokens there are logits of: the codes, then those that are none."""
        return self.settings.vocabulary or self.codebook_size

    def class_tokens(self, labels: jax.Array) -> jax.Array:
        """The tokens of classes int [...], from 0; `classes` stands for "none"."""
        return jnp.where(labels == self.classes, self.null_token, self.first_class_token + labels)

    def setup(self) -> None:
        settings, width = self.settings, self.settings.width
        self.embedding = self.param("embedding", init, (self.null_token + 1, width))
        if settings.positions == "learned":
            self.learned = self.param("positions", init, (self.max_length, width))
        block = nn.remat(Block, static_argnums=(5,)) if settings.remat else Block
        self.blocks = [
            block(settings, self.dtype, name=f"block_{i}") for i in range(settings.layers)
        ]
        self.norm_out = make_norm(settings.norm, self.dtype)
        self.head = self.param("head", init, (width, self.num_logits))
        self.embedding_dropout = nn.Dropout(settings.dropout)

    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Logits at every position. In training dropout draws from the "dropout" key."""
        return self._forward(tokens, None, 0, train)[0]

    def decode(
        self, tokens: jax.Array, cache: Cache, position: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        """Logits [b,s,num_logits] of tokens [b,s] at `position` and after, which see the earlier
        ones through `cache`; and the cache with theirs."""
        return self._forward(tokens, cache, position, False)

    def _forward(
        self, tokens: jax.Array, cache: Cache | None, position: jax.Array | int, train: bool
    ) -> tuple[jax.Array, Cache]:
        if isinstance(position, int) and position + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than the {self.max_length} there are"
            )
        x = one_hot_lookup(self.embedding, tokens)
        at = position + jnp.arange(tokens.shape[1])
        places = None
        if self.settings.positions == "learned":
            x = x + self.learned[at]
        else:
            # The class stands at row and column 0, the codes' rows and columns count from 1.
            row, column = jnp.divmod(at - 1, self.window[1])
            of_class = 0 if self.settings.positions == "rotary" else -1
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
        heads = self.settings.heads
        shape = (batch, heads, length, self.settings.width // heads)
        return [(jnp.zeros(shape, self.dtype),) * 2 for _ in range(self.settings.layers)]

    @nn.nowrap
    def check_trainable(self) -> None:
        """Raises UserError where this prior can draw codes but cannot be trained."""
        tokens = self.settings.vocabulary
        if tokens is not None and self.first_class_token + self.classes > tokens:
            raise UserError(
                f"--prior.vocabulary {tokens} has no room for {self.classes} classes from token "
                f"{self.first_class_token}; take a larger one, or another --prior.first-class."
            )
        if self.length > self.max_length:
            raise UserError(
                f"--prior.block-size {self.max_length} does not hold the {self.length} codes of an "
                "image; such a prior draws in windows, and is not trained on whole images."
            )

    @nn.nowrap
    def teacher_forced(self, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """The tokens [b,t] from which codes int [b,t] are predicted: the class, then all codes but
        the last."""
        return jnp.concatenate([self.class_tokens(labels)[:, None], codes[:, :-1]], 1)

    @nn.nowrap
    def logits(self, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """The logits [b,t,num_logits] of codes int [b,t], given the class and the codes before."""
        tokens = self.teacher_forced(labels, codes)
        return cast(jax.Array, self.apply({"params": params}, tokens))

    @nn.nowrap
    def loss(
        self, params: Any, labels: jax.Array, codes: jax.Array, keys: Mapping[str, jax.Array]
    ) -> jax.Array:
        """The training loss, float32 [b], of codes int [b,t] of classes int [b]. One key [b] per
        example, so that neither dropout ("dropout") nor corrupted codes ("codes") depend on what
        else is in the batch, or on which device it is."""
        tokens = self.teacher_forced(labels, codes)
        if self.settings.token_keep_prob < 1:
            corrupt = functools.partial(
                corrupted, self.settings.token_keep_prob, self.codebook_size
            )
            rest = jax.vmap(corrupt)(keys["codes"], tokens[:, 1:])
            tokens = jnp.concatenate([tokens[:, :1], rest], 1)
        return next_token(self.train_logits(params, tokens, keys["dropout"]), codes)

    @nn.nowrap
    def train_logits(self, params: Any, tokens: jax.Array, keys: jax.Array) -> jax.Array:
        """The logits [b,t,num_logits] of tokens [b,t] with dropout, by one key [b] per example."""
        if not self.settings.dropout:
            return cast(jax.Array, self.apply({"params": params}, tokens))

        def one(tokens: jax.Array, key: jax.Array) -> jax.Array:
            logits = self.apply({"params": params}, tokens[None], True, rngs={"dropout": key})
            return cast(jax.Array, logits)[0]

        return jax.vmap(one)(tokens, keys)

    @nn.nowrap
    def evaluate(self, params: Any, labels: jax.Array, codes: jax.Array) -> dict[str, jax.Array]:
        """The metrics of a validation, each float32 [b]."""
        logits = self.logits(params, labels, codes)
        correct = (logits.argmax(-1) == codes).astype(jnp.float32)
        return {"nll": next_token(logits, codes), "accuracy": per_example(correct)}

    @nn.nowrap
    def log_likelihood(self, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """The logarithm of the probability, in nats, float32 [b], that grids of codes int [b,h,w],
        as large as the window, are drawn by `sample`."""
        flat = codes.reshape(len(codes), -1)
        return -next_token(self.logits(params, labels, flat), flat) * flat.shape[1]

    @nn.nowrap
    def sample(
        self,
        params: Any,
        labels: jax.Array,
        keys: jax.Array,
        *,
        temperature: jax.Array | float = 1.0,
        top_k: int | None = None,
        top_p: jax.Array | float | None = None,
        guidance_scale: jax.Array | float | None = None,
        known: jax.Array | None = None,
        grid: tuple[int, int] | None = None,
        pieces: int | None = None,
    ) -> jax.Array:
        """Grids of codes int32 [b,h,w] of classes int32 [b], with one key [b] per image.

        A label of `classes` means no class. `temperature` is 0 (the most likely code) or more;
        `top_k` is from 1 to the codebook's size, `top_p` above 0, up to 1. `guidance_scale` is one
        number of 0 or more, or one per position [h*w]; without it there is no unconditional pass.
        `known` int [b,p], p up to h*w, holds codes that are not to be drawn, and -1 where they are.

        The grid is the training images' by default. The codes of a larger one are drawn one by one
        in windows; otherwise the positions are scanned in so many `pieces` (default: one per 32
        positions, at most eight), each with a cache no longer than it needs.
        """
        height, width = grid = grid or self.grid
        choose = token_choice(keys, temperature, top_k, top_p)
        given = jnp.full((len(labels), height * width), -1, jnp.int32)
        if known is not None:
            given = given.at[:, : known.shape[1]].set(known)
        scales = guidance_scale
        if scales is not None:
            scales = jnp.broadcast_to(scales, (height * width,))
        inputs = jnp.arange(height * width), scales, given.T
        if grid == self.window:
            codes = scan_positions(self, params, labels, choose, inputs, pieces)
        else:
            codes = scan_windows(self, params, labels, choose, inputs, grid)
        return codes.reshape(-1, height, width)


def corrupted(keep: float, codebook_size: int, key: jax.Array, codes: jax.Array) -> jax.Array:
    """Codes [t] of which a share `keep` stays and the others are drawn anew, as the official code's
    `pkeep`."""
    which, what = jax.random.split(key)
    drawn = jax.random.randint(what, codes.shape, 0, codebook_size)
    return jnp.where(jax.random.bernoulli(which, keep, codes.shape), codes, drawn)


def scan_positions(
    model: GPT,
    params: Any,
    labels: jax.Array,
    choose: Choose,
    inputs: Inputs,
    pieces: int | None = None,
) -> jax.Array:
    """Codes int32 [b,t] of the training images' grid, by one scan with a cache."""
    length, scales = len(inputs[0]), inputs[1]

    def step(carry: tuple[jax.Array, Cache], at: Any) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        (tokens, cache), (position, scale, given) = carry, at
        logits, cache = next_logits(model, params, tokens, cache, position, scale)
        codes = jnp.where(given < 0, choose(logits[:, : model.codebook_size], position), given)
        tokens = codes if scale is None else jnp.concatenate([codes, codes])
        return (tokens, cache), codes

    pieces = min(-(-length // 32), 8) if pieces is None else pieces
    bounds = [length * i // pieces for i in range(pieces + 1)]
    tokens, parts = model.class_tokens(with_unconditional(model, labels, scales)), []
    cache = model.empty_cache(len(tokens), 0)
    for start, stop in itertools.pairwise(bounds):
        longer = ((0, 0), (0, 0), (0, stop - start), (0, 0))
        cache = jax.tree.map(lambda x, longer=longer: jnp.pad(x, longer), cache)
        here = jax.tree.map(lambda x, part=slice(start, stop): x[part], inputs)
        (tokens, cache), codes = lax.scan(step, (tokens, cache), here)
        parts.append(codes)
    return jnp.concatenate(parts).T


def next_logits(
    model: GPT,
    params: Any,
    tokens: jax.Array,
    cache: Cache,
    position: jax.Array | int,
    scale: jax.Array | float | None,
) -> tuple[jax.Array, Cache]:
    """Logits [b,num_logits] of the code at a position, given the token before it, and the cache
    with that token. With a guidance scale, tokens [2b] and the cache hold the conditional sequences
    and then the unconditional ones."""
    logits, cache = cast(
        tuple[jax.Array, Cache],
        model.apply({"params": params}, tokens[:, None], cache, position, method=GPT.decode),
    )
    return apply_guidance(logits[:, 0], scale), cache
