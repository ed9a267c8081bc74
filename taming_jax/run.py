"""A finished (or half-finished) run as an object, for notebooks."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from taming_jax.config import Config
from taming_jax.errors import UserError
from taming_jax.models.vqgan import build_vqgan, decode_indices, encode, grid_size
from taming_jax.train.store import Store

BATCH = 64  # images a call of the compiled functions; the last batch is filled up


def load_run(workdir: str | Path) -> "Run":
    """The best checkpoint of the run in a folder (the newest where none was validated).

    Raises UserError where the folder holds no run, or none of its checkpoints can be read.
    """
    folder = Path(workdir)
    store = Store(folder, "vqgan", "nll", read_only=True)
    steps = store.steps()
    if not steps:
        raise UserError(f"{folder} holds no trained VQ-GAN; train one with train_vqgan.py.")
    best = store.best()[0]
    store.close()
    problems = []
    for step in [*([best] if best is not None else []), *reversed(steps)]:
        try:
            arrays, config = store.read(step)
        except ValueError as error:
            problems.append(f"{store.path / str(step)}: {error}")
            continue
        named = traverse_util.unflatten_dict(arrays)["nets"]["generator"]
        return Run(folder, config, step, named.get("ema", named["params"]))
    raise UserError(f"no checkpoint in {store.path} can be used ({'; '.join(problems)}).")


class Run:
    """A run's config and generator (its moving average where it keeps one).

    Images are uint8 [n,h,w,c], or float [n,h,w,c] in [-1, 1], and are answered in kind. Products
    are computed at the highest precision the device has.
    """

    def __init__(self, workdir: Path, config: Config, step: int, params: Any):
        self.workdir, self.config, self.step = workdir, config, step
        self.params = jax.device_put(params)
        self.model = build_vqgan(config)
        self._encode = jax.jit(lambda params, images: encode(self.model, params, images).indices)
        self._decode = jax.jit(functools.partial(decode_indices, self.model))

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r}, {self.config.config}, step {self.step})"

    def encode(self, images: Any) -> np.ndarray:
        """Images to code indices, int32 [n,h',w']."""
        images = np.asarray(images)
        size, channels = self.config.data.image_size, self.config.data.channels
        if images.ndim != 4 or images.shape[1:] != (size, size, channels):
            raise UserError(
                f"images of shape {images.shape} were given; this run takes "
                f"[n, {size}, {size}, {channels}]."
            )
        if images.dtype == np.uint8:
            images = images / np.float32(127.5) - 1
        return self._batched(self._encode, images.astype(np.float32))

    def decode(self, indices: Any) -> np.ndarray:
        """Code indices int [n,h',w'] to images, float32 [n,h,w,c] in [-1, 1]."""
        indices, codes = np.asarray(indices), self.config.vqgan.codebook_size
        grid = grid_size(self.config)
        if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
            raise UserError(
                f"indices of shape {indices.shape} and type {indices.dtype} were given; this run "
                f"takes integers [n, {grid}, {grid}]."
            )
        if indices.size and (indices.min() < 0 or indices.max() >= codes):
            raise UserError(f"indices go from 0 to {codes - 1}; others were given.")
        return self._batched(self._decode, indices.astype(np.int32))

    def reconstruct(self, images: Any) -> np.ndarray:
        """Images through the codes and back, in kind."""
        images = np.asarray(images)
        reconstruction = self.decode(self.encode(images))
        if images.dtype == np.uint8:
            return np.rint((reconstruction + 1) * 127.5).astype(np.uint8)
        return reconstruction

    def _batched(self, function: Callable, values: np.ndarray) -> np.ndarray:
        """Applies a compiled function in batches of one size, so that it is compiled once."""
        if not len(values):
            raise UserError("no images were given.")
        size = min(BATCH, len(values))
        parts = []
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(values), size):
                part = values[start : start + size]
                filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
                parts.append(np.asarray(function(self.params, filled))[: len(part)])
        return np.concatenate(parts)
