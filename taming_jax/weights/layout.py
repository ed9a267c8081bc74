"""Layouts: where the arrays of our networks are in PyTorch state dicts, and how to convert them in
both directions.

A layout maps the path of each of our parameters to an `Entry`. It determines imports, exports, and
the shapes that a file's arrays must have.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

Path = tuple[str, ...]


class Entry(NamedTuple):
    """The names of the PyTorch arrays that correspond to one of our arrays, and the conversions in
    both directions, which return views if possible."""

    names: tuple[str, ...]
    to_flax: Callable[..., np.ndarray]
    to_torch: Callable[[np.ndarray], tuple[np.ndarray, ...]]


Layout = dict[Path, Entry]


def map_kernel(name: str) -> Entry:
    """Maps a weight: OIHW in PyTorch to HWIO in Flax, OI to IO, and a vector to itself."""

    def to_flax(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T

    def to_torch(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T,)

    return Entry((name,), to_flax, to_torch)


def map_unchanged(name: str) -> Entry:
    """Maps an array that is the same in PyTorch and Flax."""
    return Entry((name,), lambda x: x, lambda x: (x,))


def map_parameter(layer: str, parameter: str) -> Entry:
    """Maps a Flax parameter, such as "kernel", of the layer that PyTorch calls `layer`."""
    if parameter == "kernel":
        return map_kernel(f"{layer}.weight")
    return map_unchanged(f"{layer}.{TORCH_NAMES[parameter]}")


TORCH_NAMES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def map_concatenated(entries: Iterable[Entry]) -> Entry:
    """Maps several PyTorch arrays of equal width to their concatenation along our last axis."""
    parts = tuple(entries)

    def to_flax(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate([e.to_flax(x) for e, x in zip(parts, arrays, strict=True)], -1)

    def to_torch(x: np.ndarray) -> tuple[np.ndarray, ...]:
        pieces = np.split(x, len(parts), -1)
        return tuple(e.to_torch(piece)[0] for e, piece in zip(parts, pieces, strict=True))

    return Entry(tuple(e.names[0] for e in parts), to_flax, to_torch)


def flatten_shapes(tree: Any) -> dict[Path, tuple[int, ...]]:
    """Returns the shapes of a tree of arrays, or of `jax.ShapeDtypeStruct`s, by path."""
    return {path: tuple(x.shape) for path, x in traverse_util.flatten_dict(tree).items()}


def convert_shapes(
    layout: Layout, shapes: Mapping[Path, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the PyTorch arrays by name, given the shapes of our arrays by path."""
    torch_shapes: dict[str, tuple[int, ...]] = {}
    for path, entry in layout.items():
        arrays = entry.to_torch(np.broadcast_to(np.float32(0), shapes[path]))
        torch_shapes |= {name: x.shape for name, x in zip(entry.names, arrays, strict=True)}
    return torch_shapes


def convert_to_flax(layout: Layout, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a PyTorch state dict to a tree of our parameters."""
    flat = {
        path: entry.to_flax(*(state_dict[name] for name in entry.names))
        for path, entry in layout.items()
    }
    return traverse_util.unflatten_dict(flat)


def convert_to_torch(layout: Layout, params: Any) -> dict[str, np.ndarray]:
    """Converts a tree of our parameters to a PyTorch state dict."""
    flat = traverse_util.flatten_dict(params)
    state_dict: dict[str, np.ndarray] = {}
    for path, entry in layout.items():
        state_dict |= dict(zip(entry.names, entry.to_torch(np.asarray(flat[path])), strict=True))
    return state_dict


def normalize_codes(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a `VQGAN` whose codes are compared by their directions, with codes
    of length one: other programs then compute the same indices and images."""
    quantizer = params["quantizer"]
    codes = np.asarray(quantizer["codebook"])
    codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    return {**params, "quantizer": {**quantizer, "codebook": codes}}


def build_inception_layout(paths: Iterable[Path]) -> Layout:
    """Builds the layout of the `InceptionV3` variables (`params` and `batch_stats`) in
    pytorch-fid's file."""
    return {path: map_parameter(".".join(path[1:-1]), path[-1]) for path in paths}
