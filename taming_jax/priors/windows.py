"""Sampling in sliding windows (arXiv 2012.09841, section 3.3), for grids of codes that are larger
than those an autoregressive prior was trained on. `model` is a `GPT`."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.priors.decoding import Inputs, TokenSampler, append_unconditional, apply_guidance


def scan_windows(
    model: Any,
    params: Any,
    labels: jax.Array,
    choose: TokenSampler,
    inputs: Inputs,
    grid: tuple[int, int],
) -> jax.Array:
    """Samples the codes int32 [b,h*w] of a grid that is at least as large as the model's window.

    Each code depends on the previous codes within a window around it. The window moves with every
    code, which changes the positions of the codes in it, so a cache cannot be reused. To save time,
    each pass reads only the quarters of the window that can contain sampled codes.
    """
    (height, width), window_height = grid, model.window[0]
    quarter = -(-window_height // 4)

    def count_visible_rows(row: int) -> int:
        """Returns the number of rows of the window that are read to sample a row of codes."""
        top = min(max(row - window_height // 2, 0), height - window_height)
        return min(-(-(row - top + 1) // quarter) * quarter, window_height)

    def step(rows: int, codes: jax.Array, x: Any) -> tuple[jax.Array, None]:
        position, scale, known = x
        row, column = jnp.divmod(position, width)
        grids = codes.reshape(-1, height, width)
        logits = compute_window_logits(model, params, labels, grids, row, column, rows, scale)
        chosen = jnp.where(known < 0, choose(logits[:, : model.codebook_size], position), known)
        return codes.at[:, position].set(chosen), None

    codes = inputs[2].T
    for rows, group in itertools.groupby(range(height), count_visible_rows):
        group_rows = list(group)
        part = slice(group_rows[0] * width, (group_rows[-1] + 1) * width)
        piece = jax.tree.map(lambda x, part=part: x[part], inputs)
        codes, _ = lax.scan(functools.partial(step, rows), codes, piece)
    return codes


def compute_window_start(index: jax.Array | int, window: int, size: int) -> jax.Array:
    """Returns the start of the window around the code at `index`, along an axis of `size` codes.
    The code is at the center of the window, except near the edges."""
    return jnp.clip(jnp.asarray(index) - window // 2, 0, size - window)


def compute_window_logits(
    model: Any,
    params: Any,
    labels: jax.Array,
    codes: jax.Array,
    row: jax.Array | int,
    column: jax.Array | int,
    rows: int | None = None,
    scale: jax.Array | float | None = None,
) -> jax.Array:
    """Returns the logits [b,num_logits] of the code at a row and column, given the previous codes
    in its window. The grid of codes [b,h,w] is at least as large as the model's window. Only the
    first `rows` rows of the window are read, which must include the code. Default: all rows."""
    height, width = model.window
    rows = height if rows is None else rows
    top = compute_window_start(row, height, codes.shape[1])
    left = compute_window_start(column, width, codes.shape[2])
    window = lax.dynamic_slice(codes, (0, top, left), (len(codes), rows, width))
    # Codes that are not sampled yet are -1. They come later, so their value has no effect.
    window = jnp.maximum(window, 0).reshape(len(codes), -1)
    if scale is not None:
        window = jnp.concatenate([window, window])
    logits = model.logits(params, append_unconditional(model, labels, scale), window)
    position = (row - top) * width + column - left
    logits = lax.dynamic_index_in_dim(logits, position, 1, keepdims=False)
    return apply_guidance(logits, scale)
