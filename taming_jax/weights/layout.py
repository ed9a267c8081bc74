"""Where the arrays of one of our networks stand in the state dict of another program, in both
directions: a table from the names of ours to an `Entry` each, from which an import, an export and
the shapes that a file must have all follow.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

Path = tuple[str, ...]
Arrays = dict[Path, np.ndarray]


class Entry(NamedTuple):
    """The names of arrays there, and how ours is made of them and they of ours. Both take views
    where they can."""

    names: tuple[str, ...]
    ours: Callable[..., np.ndarray]
    theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]


Layout = dict[Path, Entry]


def kernel(name: str) -> Entry:
    """A weight: OIHW there and HWIO here, OI and IO, or a vector."""

    def ours(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T

    def theirs(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T,)

    return Entry((name,), ours, theirs)


def same(name: str) -> Entry:
    """An array that is alike in both."""
    return Entry((name,), lambda x: x, lambda x: (x,))


def parameter(name: str, last: str) -> Entry:
    """The parameter `last` of a Flax layer that PyTorch calls `name`."""
    return kernel(f"{name}.weight") if last == "kernel" else same(f"{name}.{LEAVES[last]}")


LEAVES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def joined(entries: Iterable[Entry]) -> Entry:
    """An array that is several there, side by side along our last axis, all of one width."""
    parts = tuple(entries)

    def ours(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate([e.ours(x) for e, x in zip(parts, arrays, strict=True)], -1)

    def theirs(x: np.ndarray) -> tuple[np.ndarray, ...]:
        pieces = np.split(x, len(parts), -1)
        return tuple(e.theirs(piece)[0] for e, piece in zip(parts, pieces, strict=True))

    return Entry(tuple(e.names[0] for e in parts), ours, theirs)


def paths(tree: Any) -> dict[Path, tuple[int, ...]]:
    """The names and shapes of a tree of arrays, or of their descriptions."""
    return {path: tuple(x.shape) for path, x in traverse_util.flatten_dict(tree).items()}


def expected(layout: Layout, shapes: Mapping[Path, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes that arrays of the other program must have, by their names there."""
    found: dict[str, tuple[int, ...]] = {}
    for path, entry in layout.items():
        arrays = entry.theirs(np.broadcast_to(np.float32(0), shapes[path]))
        found |= {name: x.shape for name, x in zip(entry.names, arrays, strict=True)}
    return found


def ours(layout: Layout, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts another program's state dict to our parameters."""
    flat = {
        path: entry.ours(*(state_dict[name] for name in entry.names))
        for path, entry in layout.items()
    }
    return traverse_util.unflatten_dict(flat)


def theirs(layout: Layout, params: Any) -> dict[str, np.ndarray]:
    """The other program's state dict from our parameters."""
    flat = traverse_util.flatten_dict(params)
    found: dict[str, np.ndarray] = {}
    for path, entry in layout.items():
        found |= dict(zip(entry.names, entry.theirs(np.asarray(flat[path])), strict=True))
    return found


def inception_layout(names: Iterable[Path]) -> Layout:
    """Returns where the arrays of `InceptionV3` stand in the file that pytorch-fid publishes."""
    return {name: parameter(".".join(name[1:-1]), name[-1]) for name in names}
