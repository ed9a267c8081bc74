"""Grids of codes larger than those that an autoregressive prior was trained on, in windows of them
(arXiv 2012.09841, section 3.3). `model` is a GPT."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from taming_jax.priors.decoding import Choose, Inputs, apply_guidance, with_unconditional


def scan_windows(
    model: Any,
    params: Any,
    labels: jax.Array,
    choose: Choose,
    inputs: Inputs,
    grid: tuple[int, int],
) -> jax.Array:
    """Draws the codes int32 [b,h*w] of a grid at least as large as the model's window, each given
    the codes before it in a window around it. The window moves with the code, and so do the
    positions: no cache carries over from one code to the next. Each pass reads only as many
    quarters of its window as have been drawn.
    """
    (height, width), high = grid, model.window[0]
    quarter = -(-high // 4)

    def visible_rows(row: int) -> int:
        """How many rows of their window the codes of a row see."""
        top = min(max(row - high // 2, 0), height - high)
        return min(-(-(row - top + 1) // quarter) * quarter, high)

    def step(rows: int, codes: jax.Array, at: Any) -> tuple[jax.Array, None]:
        position, scale, known = at
        row, column = jnp.divmod(position, width)
        grids = codes.reshape(-1, height, width)
        logits = window_logits(model, params, labels, grids, row, column, rows, scale)
        chosen = jnp.where(known < 0, choose(logits[:, : model.codebook_size], position), known)
        return codes.at[:, position].set(chosen), None

    codes = inputs[2].T
    for rows, group in itertools.groupby(range(height), visible_rows):
        members = list(group)
        part = slice(members[0] * width, (members[-1] + 1) * width)
        here = jax.tree.map(lambda x, part=part: x[part], inputs)
        codes, _ = lax.scan(functools.partial(step, rows), codes, here)
    return codes


def window_start(at: jax.Array | int, window: int, size: int) -> jax.Array:
    """Where the window of a code begins, along an axis of so many codes: half of it before the
    code, but for the edges."""
    return jnp.clip(jnp.asarray(at) - window // 2, 0, size - window)


def window_logits(
    model: Any,
    params: Any,
    labels: jax.Array,
    codes: jax.Array,
    row: jax.Array | int,
    column: jax.Array | int,
    rows: int | None = None,
    scale: jax.Array | float | None = None,
) -> jax.Array:
    """Logits [b,num_logits] of the code at a row and column of a grid [b,h,w] at least as large as
    the model's window, given those before it in its window. Only the first `rows` rows of the
    window are read, which include that code; default: all."""
    high, wide = model.window
    rows = high if rows is None else rows
    top = window_start(row, high, codes.shape[1])
    left = window_start(column, wide, codes.shape[2])
    seen = lax.dynamic_slice(codes, (0, top, left), (len(codes), rows, wide))
    seen = jnp.maximum(seen, 0).reshape(len(codes), -1)  # what comes later is not looked at
    if scale is not None:
        seen = jnp.concatenate([seen, seen])
    logits = model.logits(params, with_unconditional(model, labels, scale), seen)
    here = (row - top) * wide + column - left
    logits = lax.dynamic_index_in_dim(logits, here, 1, keepdims=False)
    return apply_guidance(logits, scale)
