"""The masked prior, MaskGIT (arXiv 2202.04200): a transformer that sees codes on all sides.

It is trained to predict masked codes from the others. To draw an image, it starts with all codes
masked and predicts all of them at once, several times: each pass keeps the codes that it is surest
of, and masks the rest again.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from taming_jax.errors import UserError
from taming_jax.losses import cross_entropy
from taming_jax.priors.decoding import (
    Samples,
    append_unconditional,
    apply_guidance,
    make_token_sampler,
)
from taming_jax.priors.transformer import Transformer

NO_LIKELIHOOD = (
    "a masked prior has no likelihood, since it draws many codes at once; use an autoregressive or "
    "a random-order prior."
)


class MaskedTransformer(Transformer):
    """A transformer without causal masking, over the class of an image followed by its codes, some
    of which are replaced with the mask token. The mask token is the last in the embedding table."""

    causal: ClassVar[bool] = False
    completion_limits: ClassVar[str] = ""

    @property
    def mask_token(self) -> int:
        """The token of a masked code."""
        return self.null_token + 1

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the embedding table."""
        return self.mask_token + 1

    @property
    def num_positions(self) -> int:
        """The number of learned positions, for the class and the codes."""
        return self.length + 1

    @property
    def logits_per_image(self) -> int:
        """The number of logits per image that sampling computes at once."""
        return self.length * self.codebook_size

    def __call__(self, tokens: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Returns the logits float32 [b,t,codebook_size] at each position of tokens int32 [b,t], of
        which the first is the class. `keys` uint32 [b,2] are the keys for dropout, or None outside
        training."""
        x, coordinates, t = self.embedding[tokens], None, tokens.shape[1]
        if self.settings.positions == "learned":
            x = x + self.position_embedding[:t]
        else:
            coordinates = self.locate(jnp.arange(t))
        return self.run_blocks(x, coordinates, keys)[0]

    @nn.nowrap
    def mask_codes(self, labels: jax.Array, codes: jax.Array, is_masked: jax.Array) -> jax.Array:
        """Returns the input tokens [b,1+t]: the class, followed by the codes [b,t], where masked
        codes are replaced with the mask token."""
        tokens = jnp.where(is_masked, self.mask_token, codes)
        return jnp.concatenate([self.labels_to_tokens(labels)[:, None], tokens], 1)

    @nn.nowrap
    def logits(
        self, params: Any, labels: jax.Array, codes: jax.Array, is_masked: jax.Array
    ) -> jax.Array:
        """Returns the logits [b,t,codebook_size] for codes [b,t], of which some are masked."""
        tokens = self.mask_codes(labels, codes, is_masked)
        return cast(jax.Array, self.apply({"params": params}, tokens))[:, 1:]

    @nn.nowrap
    def loss(
        self,
        params: Any,
        labels: jax.Array,
        codes: jax.Array,
        keys: Mapping[str, jax.Array],
        progress: jax.Array | float,
    ) -> jax.Array:
        """Returns the cross-entropy of the masked codes, float32 [b], for codes int [b,t].

        A random share cos(pi u / 2) of the codes is masked, with u uniform from 0 to 1. The sum
        over the masked codes is divided by their expected number, 2 t / pi, so that each masked
        code has the same weight, as in the official code. `keys` maps "dropout" and "codes" (for
        the mask) to one key per example [b]. `progress` has no effect.
        """
        length = codes.shape[1]

        def draw_mask(key: jax.Array) -> jax.Array:
            share_key, mask_key = jax.random.split(key)
            share = jnp.cos(jnp.pi / 2 * jax.random.uniform(share_key))
            count = jnp.maximum(jnp.round(share * length), 1)
            return choose_positions(mask_key, length, count)

        is_masked = jax.vmap(draw_mask)(keys["codes"])
        tokens = self.mask_codes(labels, codes, is_masked)
        logits = self.train_logits(params, tokens, keys["dropout"])[:, 1:]
        losses = cross_entropy(logits, codes, self.settings.masked.label_smoothing)
        return (losses * is_masked).sum(1) / (length * 2 / math.pi)

    @nn.nowrap
    def evaluate(self, params: Any, labels: jax.Array, codes: jax.Array) -> dict[str, jax.Array]:
        """Returns the validation metrics of codes [b,t], float32 [b] each: the mean over the masked
        codes of "nll", in nats per code, and "accuracy".

        The number of masked codes is uniform from 1 to t. The mean of "nll" is therefore the loss
        of an autoregressive model over random orders (arXiv 2110.02037), an upper bound of the
        negative log-likelihood of drawing the codes one by one in random order. The mask of an
        image depends only on its codes, so that all validations use the same.
        """
        length = codes.shape[1]

        def draw_mask(codes: jax.Array) -> jax.Array:
            key = jax.random.key(hash_codes(codes))
            count_key, mask_key = jax.random.split(key)
            count = jax.random.randint(count_key, (), 1, length + 1)
            return choose_positions(mask_key, length, count)

        is_masked = jax.vmap(draw_mask)(codes)
        logits = self.logits(params, labels, codes, is_masked)
        nll, is_correct = cross_entropy(logits, codes), logits.argmax(-1) == codes
        count = is_masked.sum(1)
        return {
            "nll": (nll * is_masked).sum(1) / count,
            "accuracy": (is_correct & is_masked).sum(1) / count,
        }

    @nn.nowrap
    def check_likelihood(self, grid: tuple[int, int]) -> None:
        """Raises UserError, since the probability of an image under parallel decoding is not
        known."""
        raise UserError(NO_LIKELIHOOD)

    @nn.nowrap
    def log_likelihood(self, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """Raises UserError; see `check_likelihood`."""
        raise UserError(NO_LIKELIHOOD)

    @nn.nowrap
    def check_drawing(self, grid: tuple[int, int], known: Any) -> None:
        """Raises UserError for grids that are not as large as those of the training images."""
        if grid != self.grid:
            raise UserError(
                f"a masked prior draws only images of the training size, a grid of {self.grid} "
                f"codes, not {grid}; use another kind of prior for larger ones."
            )

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
        decoding_steps: int | None = None,
        decoding_order: str | None = None,
        choice_temperature: jax.Array | float | None = None,
    ) -> Samples:
        """Samples grids of codes for labels int32 [b], with one key per image [b].

        See `GPT.sample` for the other arguments. A guidance scale per position [h*w] applies to a
        pass by the share of codes that are known before it.

        Args:
          decoding_steps: Number of passes. After pass i of n, cos(pi i / (2 n)) of the codes that
            were not known from the start are still masked.
          decoding_order: "confidence" keeps the codes with the largest sum of log-probability and
            Gumbel noise. "halton" keeps codes in a fixed order that spreads over the image (arXiv
            2503.17076), rotated at random for each image.
          choice_temperature: Factor of the Gumbel noise, which falls linearly to 0 over the passes.
        """
        settings, length = self.settings.masked, self.length
        steps = decoding_steps or settings.decoding_steps
        noise = settings.choice_temperature if choice_temperature is None else choice_temperature
        codes = jnp.full((len(labels), length), -1, jnp.int32)
        if known is not None:
            codes = codes.at[:, : known.shape[1]].set(known)
        unknown = (codes < 0).sum(1)
        masked_shares = np.cos(np.pi / 2 * np.arange(steps + 1) / steps)  # before and after passes
        masked_shares[-1] = 0
        scales = guidance_scale
        if scales is not None:
            positions = ((1 - masked_shares[:-1]) * length).astype(int)
            scales = jnp.broadcast_to(scales, (length,))[positions]
        choose = make_token_sampler(keys, temperature, top_k, top_p)

        def draw(sample: Callable[[jax.Array], jax.Array], number: jax.Array | int) -> jax.Array:
            """Samples with a key per image that differs for each number."""
            return jax.vmap(lambda key: sample(jax.random.fold_in(key, number)))(keys)

        order = None  # the place of each code in the order of decoding
        if (decoding_order or settings.decoding_order) == "halton":
            starts = draw(lambda key: jax.random.randint(key, (), 0, length), 2 * steps)
            order = (rank_by_halton(self.grid) - starts[:, None]) % length

        def decode(codes: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
            step, masked_share, scale = x
            is_masked = codes < 0
            copies = 1 if scale is None else 2
            logits = self.logits(
                params, append_unconditional(self, labels, scale),
                jnp.tile(codes, (copies, 1)), jnp.tile(is_masked, (copies, 1)),
            )  # fmt: skip
            logits = apply_guidance(logits, scale)
            drawn = jnp.where(is_masked, choose(logits, step), codes)
            if order is None:
                gumbel = draw(lambda key: jax.random.gumbel(key, (length,)), steps + step)
                factor = noise * (1 - (step + 1) / steps)
                confidence = factor * gumbel - cross_entropy(logits, drawn)
            else:
                confidence = -order
            # Each pass keeps at least one code, until none is masked.
            count = jnp.minimum(jnp.floor(masked_share * unknown), is_masked.sum(1) - 1)
            stays_masked = rank(jnp.where(is_masked, confidence, jnp.inf)) < count[:, None]
            return jnp.where(stays_masked, -1, drawn), stays_masked

        shares = jnp.asarray(masked_shares[1:], jnp.float32)
        inputs = jnp.arange(steps), shares, scales
        drawn, stays_masked = lax.scan(decode, codes, inputs)
        passes = jnp.where(codes < 0, stays_masked.sum(0), -1)
        return Samples(drawn.reshape(-1, *self.grid), passes.reshape(-1, *self.grid))


def rank(values: jax.Array) -> jax.Array:
    """Returns the rank of each value [...,n] along the last axis, from 0 for the smallest."""
    return jnp.argsort(jnp.argsort(values, -1), -1)


def choose_positions(key: jax.Array, length: int, count: jax.Array) -> jax.Array:
    """Returns a mask bool [length] of `count` random positions."""
    return rank(jax.random.uniform(key, (length,))) < count


def hash_codes(codes: jax.Array) -> jax.Array:
    """Returns a hash uint32 of codes int [t]."""
    factors = np.random.default_rng(0).integers(0, 2**32, codes.shape[0], np.uint32) | 1
    return (codes.astype(jnp.uint32) * factors).sum(dtype=jnp.uint32)


def rank_by_halton(grid: tuple[int, int]) -> np.ndarray:
    """Returns the place int [h*w] of each cell of a grid in the order of the Halton sequence in
    bases 2 and 3, which visits the cells evenly. Cells that it visits again are skipped."""
    height, width = grid
    order: dict[int, None] = {}
    i = 1
    while len(order) < height * width:
        row, column = int(halton(i, 2) * height), int(halton(i, 3) * width)
        order[row * width + column] = None
        i += 1
    places = np.empty(height * width, int)
    places[list(order)] = np.arange(height * width)
    return places


def halton(index: int, base: int) -> float:
    """Returns a number of the van der Corput sequence: the digits of `index`, reversed, as a
    fraction."""
    value, share = 0.0, 1.0
    while index:
        share /= base
        index, digit = divmod(index, base)
        value += digit * share
    return value
