"""What the official PyTorch modules computed, where those files are at hand, and how to compare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from taming_jax.weights.layout import convert_shapes, convert_to_flax, flatten_shapes

FOLDER = Path(__file__).parents[2] / "shared" / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    file = FOLDER / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"{file.name} of the recorded official modules is not at hand")
    with np.load(file) as content:
        return dict(content)


def under(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def without_counts(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A discriminator's, without how often its BatchNorm was updated, which ours does not count."""
    return {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}


def converted(table: Callable, params: Any, state_dict: dict[str, np.ndarray]) -> Any:
    """A recorded state dict as parameters, by the table that says where those of ours are in it.
    It must hold them all, in their shapes, and no others."""
    layout = table(flatten_shapes(params))
    assert convert_shapes(layout, flatten_shapes(params)) == {
        k: x.shape for k, x in state_dict.items()
    }
    return jax.tree.map(np.ascontiguousarray, convert_to_flax(layout, state_dict))


def nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1)


def assert_close(
    actual: Any, expected: Any, what: str, relative: float = 1e-4, floor: float = 1e-6
) -> None:
    """The largest difference, over the array's largest value, is at most `relative`; `floor` is
    always allowed."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    difference = np.abs(actual.astype(np.float64) - expected).max()
    allowed = max(relative * np.abs(expected).max(), floor)
    assert difference <= allowed, f"{what}: {difference:.3g} is more than {allowed:.3g}"


def assert_trees_close(
    actual: Any, expected: Any, what: str, relative: float = 1e-4, floor: float = 1e-6
) -> None:
    """The same for every leaf of two trees of the same structure."""
    left, structure = jax.tree_util.tree_flatten_with_path(actual)
    right, other = jax.tree_util.tree_flatten_with_path(expected)
    assert structure == other, f"{what}: {structure} is not {other}"
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert_close(a, b, what + jax.tree_util.keystr(path), relative, floor)
