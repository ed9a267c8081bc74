"""Drawing grids of codes from the prior: one scan over the positions for a whole batch."""

import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.models.gpt import GPT, Cache


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Logits [..., n] with all but the k largest at -inf."""
    smallest = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Logits [..., n] with all but the nucleus at -inf: the fewest that hold a share p of the
    probability (arXiv 1904.09751). At least the largest is kept."""
    ordered = -jnp.sort(-logits, -1)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, -1) - probabilities
    smallest = jnp.where(before < jnp.maximum(p, 1e-9), ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def guided(conditional: jax.Array, unconditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598) of logits: a scale of 0 answers the unconditional
    ones, 1 the conditional, more goes beyond."""
    return unconditional + scale * (conditional - unconditional)


def next_logits(
    model: GPT,
    params: Any,
    tokens: jax.Array,
    cache: Cache,
    position: jax.Array | int,
    scale: jax.Array | float | None,
) -> tuple[jax.Array, Cache]:
    """Logits [b,k] of the code at a position, given the token before it, and the cache with that
    token. With a guidance scale, tokens [2b] and the cache hold the conditional sequences and then
    the unconditional ones."""
    logits, cache = cast(
        tuple[jax.Array, Cache],
        model.apply({"params": params}, tokens[:, None], cache, position, method=GPT.decode),
    )
    logits = logits[:, 0]
    if scale is not None:
        conditional, unconditional = jnp.split(logits, 2)
        logits = guided(conditional, unconditional, scale)
    return logits, cache


def sample(
    model: GPT,
    params: Any,
    labels: jax.Array,
    keys: jax.Array,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
    guidance_scale: jax.Array | float | None = None,
    prefix: jax.Array | None = None,
    pieces: int | None = None,
) -> jax.Array:
    """Codes int32 [b,t], in raster order, of classes int32 [b].

    A label of `model.classes` means no class. `keys` [b] is a key an image: an image's codes do not
    depend on the others in the batch. `temperature` is 0 (the most likely code) or more; `top_k`
    from 1 to the codebook's size, `top_p` above 0 up to 1. `guidance_scale` is one number of 0 or
    more, or one a position [t]; None leaves the unconditional pass out. `prefix` int [b,p], p up to
    t, gives the first codes.
    The positions are scanned in so many `pieces`, each with a cache no longer than it needs: one
    for 32 positions, at most eight, unless told.
    """
    length, batch = model.length, len(labels)
    first, scales = model.class_tokens(labels), None
    if guidance_scale is not None:
        first = jnp.concatenate([first, jnp.full_like(first, model.none)])
        scales = jnp.broadcast_to(guidance_scale, (length,))
    given = jnp.zeros((batch, length), jnp.int32)
    held = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        given = given.at[:, :held].set(prefix)

    def choose(logits: jax.Array, position: jax.Array) -> jax.Array:
        logits = logits[:, : model.codebook_size]
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        scaled = logits / jnp.maximum(temperature, 1e-6)
        if top_p is not None:
            scaled = keep_top_p(scaled, top_p)
        drawn = jax.vmap(lambda k, x: jax.random.categorical(jax.random.fold_in(k, position), x))(
            keys, scaled
        )
        return jnp.where(temperature == 0, logits.argmax(-1), drawn).astype(jnp.int32)

    def step(carry: tuple[jax.Array, Cache], at: Any) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        tokens, cache = carry
        position, scale, known = at
        logits, cache = next_logits(model, params, tokens, cache, position, scale)
        codes = jnp.where(position < held, known, choose(logits, position))
        tokens = jnp.concatenate([codes, codes]) if guidance_scale is not None else codes
        return (tokens, cache), codes

    pieces = min(-(-length // 32), 8) if pieces is None else pieces
    bounds = [length * i // pieces for i in range(pieces + 1)]
    carry, parts = (first, model.empty_cache(len(first), 0)), []
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        tokens, cache = carry
        longer = ((0, 0), (0, 0), (0, stop - start), (0, 0))
        cache = jax.tree.map(lambda x, longer=longer: jnp.pad(x, longer), cache)
        here = slice(start, stop)
        at = (jnp.arange(length)[here], None if scales is None else scales[here], given.T[here])
        carry, codes = lax.scan(step, (tokens, cache), at)
        parts.append(codes)
    return jnp.concatenate(parts).T
