"""Drawing grids of codes from the prior: one scan over the positions for a whole batch, and for
grids larger than those it was trained on, in windows of them."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from taming_jax.losses import next_token
from taming_jax.priors.autoregressive import GPT, Cache, teacher_forced


def micro_batch(device: Any) -> int:
    """How many images a device draws at once. The number is fixed for a kind of device, because
    another one rounds otherwise, and a rounding can turn a code. A CPU draws few, so that a single
    image does not take the time of many."""
    return 8 if device.platform == "cpu" else 32


def sample_keys(
    seed: jax.Array | np.uint32, labels: jax.Array | np.ndarray, numbers: jax.Array | np.ndarray
) -> jax.Array:
    """The random keys [b] of images of classes int [b]: a seed, a class and the image's number
    within it determine the image."""
    key = jax.random.key(seed)
    return jax.vmap(lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i))(labels, numbers)


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
    """Classifier-free guidance (arXiv 2207.12598) of logits: a scale of 0 returns the unconditional
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


def choosing(
    model: GPT,
    keys: jax.Array,
    temperature: jax.Array | float,
    top_k: int | None,
    top_p: jax.Array | float | None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`choose(logits [b,spoken], position) -> codes int32 [b]`, by a key an image [b]."""

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

    return choose


def unknown(batch: int, length: int, known: jax.Array | None) -> jax.Array:
    """Codes int32 [b,length], -1 where none is known, of known ones [b,p]."""
    given = jnp.full((batch, length), -1, jnp.int32)
    return given if known is None else given.at[:, : known.shape[1]].set(known)


def sample(
    model: GPT,
    params: Any,
    labels: jax.Array,
    keys: jax.Array,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
    guidance_scale: jax.Array | float | None = None,
    known: jax.Array | None = None,
    pieces: int | None = None,
) -> jax.Array:
    """Codes int32 [b,t], in raster order, of classes int32 [b].

    A label of `model.classes` means no class. `keys` [b] is a key an image: an image's codes do not
    depend on the others in the batch. `temperature` is 0 (the most likely code) or more; `top_k`
    from 1 to the codebook's size, `top_p` above 0 up to 1. `guidance_scale` is one number of 0 or
    more, or one a position [t]; None leaves the unconditional pass out. `known` int [b,p], p up to
    t, holds codes that are not to be drawn, and -1 where they are.
    The positions are scanned in so many `pieces`, each with a cache no longer than it needs: one
    for 32 positions, at most eight, unless told.
    """
    length, batch = model.length, len(labels)
    first, scales = model.class_tokens(labels), None
    if guidance_scale is not None:
        first = jnp.concatenate([first, jnp.full_like(first, model.none)])
        scales = jnp.broadcast_to(guidance_scale, (length,))
    given = unknown(batch, length, known)
    choose = choosing(model, keys, temperature, top_k, top_p)

    def step(carry: tuple[jax.Array, Cache], at: Any) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        tokens, cache = carry
        position, scale, given = at
        logits, cache = next_logits(model, params, tokens, cache, position, scale)
        codes = jnp.where(given < 0, choose(logits, position), given)
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


def window_start(at: jax.Array | int, window: int, size: int) -> jax.Array:
    """Where the window of a code begins, along an axis of so many codes: half of it before the
    code, but for the edges."""
    return jnp.clip(jnp.asarray(at) - window // 2, 0, size - window)


def window_logits(
    model: GPT,
    params: Any,
    labels: jax.Array,
    codes: jax.Array,
    row: jax.Array | int,
    column: jax.Array | int,
    rows: int | None = None,
    scale: jax.Array | float | None = None,
) -> jax.Array:
    """Logits [b,spoken] of the code at a row and column of a grid [b,h,w] at least as large as the
    model's window, given those before it in its window. Of the window only the first `rows` are
    looked at, which hold that code; all unless told."""
    high, wide = model.window
    rows = high if rows is None else rows
    top = window_start(row, high, codes.shape[1])
    left = window_start(column, wide, codes.shape[2])
    seen = lax.dynamic_slice(codes, (0, top, left), (len(codes), rows, wide))
    seen = jnp.maximum(seen, 0).reshape(len(codes), -1)  # what comes later is not looked at
    if scale is not None:
        labels = jnp.concatenate([labels, jnp.full_like(labels, model.classes)])
        seen = jnp.concatenate([seen, seen])
    tokens = teacher_forced(model, labels, seen)
    logits = cast(jax.Array, model.apply({"params": params}, tokens))
    here = (row - top) * wide + column - left
    logits = lax.dynamic_index_in_dim(logits, here, 1, keepdims=False)
    if scale is None:
        return logits
    conditional, unconditional = jnp.split(logits, 2)
    return guided(conditional, unconditional, scale)


def sample_windows(
    model: GPT,
    params: Any,
    labels: jax.Array,
    keys: jax.Array,
    grid: tuple[int, int],
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
    guidance_scale: jax.Array | float | None = None,
    known: jax.Array | None = None,
) -> jax.Array:
    """As `sample`, codes int32 [b, h * w] of a grid at least as large as the model's window: each
    given those before it in a window about it (arXiv 2012.09841, section 3.3). Windows move, and
    positions with them, so that nothing of a code's pass serves the next; but each looks at no more
    of its window than has been drawn, in quarters of it.
    """
    (height, width), batch = grid, len(labels)
    high, wide = model.window
    given = unknown(batch, height * width, known)
    choose = choosing(model, keys, temperature, top_k, top_p)
    scales = None
    if guidance_scale is not None:
        scales = jnp.broadcast_to(guidance_scale, (height * width,))
    quarter = -(-high // 4)

    def rows_of(row: int) -> int:
        """How much of its window the codes of a row look at."""
        top = min(max(row - high // 2, 0), height - high)
        return min(-(-(row - top + 1) // quarter) * quarter, high)

    def step(rows: int, codes: jax.Array, at: Any) -> tuple[jax.Array, None]:
        position, scale, known = at
        row, column = jnp.divmod(position, width)
        grids = codes.reshape(batch, height, width)
        logits = window_logits(model, params, labels, grids, row, column, rows, scale)
        chosen = jnp.where(known < 0, choose(logits, position), known)
        return codes.at[:, position].set(chosen), None

    codes = given
    for rows, group in itertools.groupby(range(height), rows_of):
        those = list(group)
        here = slice(those[0] * width, (those[-1] + 1) * width)
        at = (
            jnp.arange(height * width)[here], None if scales is None else scales[here],
            given.T[here],
        )  # fmt: skip
        codes, _ = lax.scan(functools.partial(step, rows), codes, at)
    return codes


def window_likelihood(model: GPT, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
    """The logarithm of the probability, in nats, float32 [b], that grids of codes int [b,h,w] are
    drawn by `sample_windows`."""
    height, width = codes.shape[1:]

    def step(total: jax.Array, position: jax.Array) -> tuple[jax.Array, None]:
        row, column = jnp.divmod(position, width)
        logits = window_logits(model, params, labels, codes, row, column)
        code = lax.dynamic_slice(codes, (0, row, column), (len(codes), 1, 1))[:, 0]
        return total - next_token(logits[:, None], code), None

    return lax.scan(step, jnp.zeros(len(codes)), jnp.arange(height * width))[0]
