"""The autoregressive prior: a causal transformer over grids of codes, in raster order.

A sequence starts with the class of the image or with the null token, so that the model also
predicts the first code: the logits at position i predict code i, given the class and the previous
codes. Unless codes and classes share a vocabulary, the embedding table holds the codes, then the
classes, then the null token, and the head predicts only codes."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.errors import UserError
from taming_jax.losses import next_token, per_example
from taming_jax.parallel.devices import get_default_device
from taming_jax.priors.decoding import (
    Inputs,
    Samples,
    TokenSampler,
    append_unconditional,
    apply_guidance,
    make_token_sampler,
    sampling_pieces,
)
from taming_jax.priors.transformer import Cache, Transformer
from taming_jax.priors.windows import scan_windows


class GPT(Transformer):
    """A causal transformer that maps tokens int32 [b,t] to logits float32 [b,t,num_logits].

    `order` int [b,t] is the order in which a subclass predicts the codes. Here it has no effect.
    """

    @property
    def num_positions(self) -> int:
        """The maximum length of a sequence."""
        return self.settings.block_size or self.length

    @property
    def completion_limits(self) -> str:
        """A sentence on the known codes that `sample` does not use."""
        return (
            "This prior draws codes from left to right and from top to bottom, and does not see "
            "kept codes that come later."
        )

    @property
    def window(self) -> tuple[int, int]:
        """The height and width of the grid that the model reads at once: the grid of the training
        images if it fits in a sequence, otherwise the largest square that fits."""
        side = math.isqrt(self.num_positions)
        return self.grid if self.length <= self.num_positions else (side, side)

    @property
    def first_class_token(self) -> int:
        """The token of the first class."""
        return self.codebook_size if self.settings.vocabulary is None else self.settings.first_class

    @property
    def null_token(self) -> int:
        """The token of images without a class."""
        return self.settings.vocabulary or self.codebook_size + self.classes

    @property
    def num_logits(self) -> int:
        """The number of logits per position: for the codes, then for other tokens, if any."""
        return self.settings.vocabulary or self.codebook_size

    def __call__(
        self, tokens: jax.Array, keys: jax.Array | None = None, order: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits at every position. `keys` uint32 [b,2] are the keys for dropout, or
        None outside training."""
        return self.run_blocks(*self.embed(tokens, 0, order), keys)[0]

    def decode(
        self,
        tokens: jax.Array,
        cache: Cache,
        position: jax.Array | int,
        order: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Returns the logits [b,s,num_logits] for tokens [b,s] at the positions from `position` on,
        which attend to the earlier tokens through `cache`, and the updated cache."""
        return self.run_blocks(*self.embed(tokens, position, order), None, cache, position)

    def embed(
        self, tokens: jax.Array, position: jax.Array | int, order: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the embeddings [b,s,width] of tokens [b,s] at the positions from `position` on,
        and their coordinates for rotary embeddings."""
        if isinstance(position, int) and position + tokens.shape[1] > self.num_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens from position {position} on exceed the maximum length "
                f"{self.num_positions}"
            )
        x = self.embedding[tokens]
        if self.settings.positions != "learned":
            return x, self.locate(position + jnp.arange(tokens.shape[1]))
        offsets = lax.dynamic_slice_in_dim(self.position_embedding, position, tokens.shape[1])
        return x + offsets, None

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for sequences of up to `length` tokens."""
        heads = self.settings.heads
        shape = (batch, heads, length, self.settings.width // heads)
        return [(jnp.zeros(shape, self.dtype),) * 2 for _ in range(self.settings.layers)]

    @nn.nowrap
    def check_trainable(self) -> None:
        """Raises UserError if this prior cannot be trained."""
        vocabulary = self.settings.vocabulary
        if vocabulary is not None and self.first_class_token + self.classes > vocabulary:
            raise UserError(
                f"--prior.vocabulary {vocabulary} is too small for {self.classes} classes from "
                f"token {self.first_class_token}. Set a larger vocabulary or a lower "
                "--prior.first-class."
            )
        if self.length > self.num_positions:
            raise UserError(
                f"--prior.block-size {self.num_positions} is smaller than the {self.length} codes "
                "of an image, so this prior can sample in windows but cannot be trained. Set a "
                "larger --prior.block-size."
            )

    @nn.nowrap
    def shift_right(self, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """Returns the input tokens [b,t] from which the model predicts codes int [b,t]: the class,
        followed by all codes but the last."""
        return jnp.concatenate([self.labels_to_tokens(labels)[:, None], codes[:, :-1]], 1)

    @nn.nowrap
    def logits(self, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """Returns the logits [b,t,num_logits] for codes int [b,t], given the class and the previous
        codes."""
        tokens = self.shift_right(labels, codes)
        return cast(jax.Array, self.apply({"params": params}, tokens))

    @nn.nowrap
    def loss(
        self,
        params: Any,
        labels: jax.Array,
        codes: jax.Array,
        keys: Mapping[str, jax.Array],
        progress: jax.Array | float,
    ) -> jax.Array:
        """Returns the training loss, float32 [b], for codes int [b,t] and labels int [b].

        `keys` maps "dropout" and "codes" (for the corruption of codes) to one key per example [b],
        so that neither depends on the rest of the batch or on the device. `progress`, the fraction
        of the run that is over, has no effect.
        """
        tokens = self.shift_right(labels, self.corrupt_inputs(codes, keys))
        return next_token(self.train_logits(params, tokens, keys["dropout"]), codes)

    @nn.nowrap
    def corrupt_inputs(self, codes: jax.Array, keys: Mapping[str, jax.Array]) -> jax.Array:
        """Replaces some of the codes [b,t] as --prior.token-keep-prob requires."""
        keep_prob = self.settings.token_keep_prob
        if keep_prob == 1:
            return codes
        corrupt = functools.partial(corrupt_codes, keep_prob, self.codebook_size)
        # The last code is not an input.
        return jnp.concatenate([jax.vmap(corrupt)(keys["codes"], codes[:, :-1]), codes[:, -1:]], 1)

    @nn.nowrap
    def evaluate(self, params: Any, labels: jax.Array, codes: jax.Array) -> dict[str, jax.Array]:
        """Returns the validation metrics of codes [b,t], float32 [b] each: "nll", in nats per code,
        and "accuracy"."""
        logits = self.logits(params, labels, codes)
        correct = (logits.argmax(-1) == codes).astype(jnp.float32)
        return {"nll": next_token(logits, codes), "accuracy": per_example(correct)}

    @nn.nowrap
    def check_likelihood(self, grid: tuple[int, int]) -> None:
        """Raises UserError unless grids of codes are as large as the window."""
        if grid != self.window:
            raise UserError(
                f"the images have a grid of {grid} codes, but the prior computes likelihoods only "
                f"for grids of {self.window}; pass images of that size."
            )

    @nn.nowrap
    def log_likelihood(self, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """Returns the log-likelihood in nats, float32 [b], of grids of codes int [b,h,w].

        Unless codes and classes share a vocabulary, this is the log of the probability with which
        `sample` draws the grids by default. The grids must be as large as the window.
        """
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
    ) -> Samples:
        """Samples grids of codes for labels int32 [b], with one key per image [b].

        Args:
          params: Parameters of the network.
          labels: Classes from 0, where the label `classes` means no class.
          keys: Random keys, one per image.
          temperature: At least 0. At 0, the most likely codes are chosen.
          top_k: From 1 to the codebook size. Default: all codes.
          top_p: Above 0, up to 1. Default: all codes.
          guidance_scale: At least 0, either one number or one per position [h*w]. By default, there
            is no guidance and no unconditional pass.
          known: Fixed codes int [b,p], p <= h*w, or -1 for codes to sample. Default: none.
          grid: Height and width. A grid larger than the window is sampled in windows, without a
            cache. Default: the grid of the training images.
          pieces: Number of consecutive scans over the positions. The cache grows between scans and
            so stays as short as possible. Default: `sampling_pieces` of the default device.
        """
        height, width = grid = grid or self.grid
        choose = make_token_sampler(keys, temperature, top_k, top_p)
        fixed = jnp.full((len(labels), height * width), -1, jnp.int32)
        if known is not None:
            fixed = fixed.at[:, : known.shape[1]].set(known)
        scales = guidance_scale
        if scales is not None:
            scales = jnp.broadcast_to(scales, (height * width,))
        inputs = jnp.arange(height * width), scales, fixed.T
        if grid == self.window:
            codes = self.sample_window(params, labels, choose, inputs, pieces)
        else:
            codes = scan_windows(self, params, labels, choose, inputs, grid)
        passes = jnp.where(fixed < 0, inputs[0], -1)
        return Samples(codes.reshape(-1, *grid), passes.reshape(-1, *grid))

    @nn.nowrap
    def sample_window(
        self,
        params: Any,
        labels: jax.Array,
        choose: TokenSampler,
        inputs: Inputs,
        pieces: int | None,
    ) -> jax.Array:
        """Samples the codes int32 [b,t] of a grid that is as large as the window."""
        return scan_positions(self, params, labels, choose, inputs, pieces)


def corrupt_codes(
    keep_prob: float, codebook_size: int, key: jax.Array, codes: jax.Array
) -> jax.Array:
    """Keeps each of the codes [t] with probability `keep_prob` and replaces the others with random
    codes, like `pkeep` in the official code."""
    mask_key, code_key = jax.random.split(key)
    random_codes = jax.random.randint(code_key, codes.shape, 0, codebook_size)
    return jnp.where(jax.random.bernoulli(mask_key, keep_prob, codes.shape), codes, random_codes)


def scan_positions(
    model: GPT,
    params: Any,
    labels: jax.Array,
    choose: TokenSampler,
    inputs: Inputs,
    pieces: int | None = None,
    order: jax.Array | None = None,
) -> jax.Array:
    """Samples the codes int32 [b,t] of a grid that is as large as the window, with a cache. The
    known codes in `inputs` and the result are in the given order, int [b,t] or, with guidance,
    [2b,t]. Default: the raster order."""
    length, scales = len(inputs[0]), inputs[1]

    def step(carry: tuple[jax.Array, Cache], x: Any) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        (tokens, cache), (position, scale, known) = carry, x
        logits, cache = compute_next_logits(model, params, tokens, cache, position, scale, order)
        codes = jnp.where(known < 0, choose(logits[:, : model.codebook_size], position), known)
        tokens = codes if scale is None else jnp.concatenate([codes, codes])
        return (tokens, cache), codes

    pieces = pieces or sampling_pieces(get_default_device(), length)
    bounds = [length * i // pieces for i in range(pieces + 1)]
    tokens, parts = model.labels_to_tokens(append_unconditional(model, labels, scales)), []
    cache = model.init_cache(len(tokens), 0)
    for start, stop in itertools.pairwise(bounds):
        padding = ((0, 0), (0, 0), (0, stop - start), (0, 0))
        cache = jax.tree.map(lambda x, padding=padding: jnp.pad(x, padding), cache)
        piece = jax.tree.map(lambda x, part=slice(start, stop): x[part], inputs)
        (tokens, cache), codes = lax.scan(step, (tokens, cache), piece)
        parts.append(codes)
    return jnp.concatenate(parts).T


def compute_next_logits(
    model: GPT,
    params: Any,
    tokens: jax.Array,
    cache: Cache,
    position: jax.Array | int,
    scale: jax.Array | float | None,
    order: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Returns the logits [b,num_logits] of the code at a position, given the previous tokens [b],
    and the updated cache. With a guidance scale, the tokens [2b] and the cache hold the conditional
    sequences, followed by the unconditional ones."""
    decode = functools.partial(model.apply, {"params": params}, method=GPT.decode)
    logits, cache = cast(tuple[jax.Array, Cache], decode(tokens[:, None], cache, position, order))
    return apply_guidance(logits[:, 0], scale), cache
