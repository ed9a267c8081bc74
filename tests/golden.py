"""Recorded outputs of the official PyTorch modules, and functions that compare arrays with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from taming_jax.weights.layout import convert_shapes, convert_to_flax, flatten_shapes

FOLDER = Path(__file__).parents[2] / "shared" / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    """Returns the recorded arrays of a module. Skips the test if the file does not exist."""
    file = FOLDER / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"the recorded outputs {file.name} are not available")
    with np.load(file) as content:
        return dict(content)


def select_prefix(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays whose names start with a prefix, without the prefix in their names."""
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def drop_counts(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a state dict without the update counts of BatchNorm, which our BatchNorm lacks."""
    return {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}


def convert_state_dict(
    build_layout: Callable, params: Any, state_dict: dict[str, np.ndarray]
) -> Any:
    """Converts a recorded state dict to our parameters, by the layout from `build_layout`. The
    state dict must have exactly the arrays of the layout, with their shapes."""
    layout = build_layout(flatten_shapes(params))
    assert convert_shapes(layout, flatten_shapes(params)) == {
        k: x.shape for k, x in state_dict.items()
    }
    return jax.tree.map(np.ascontiguousarray, convert_to_flax(layout, state_dict))


def to_nhwc(array: np.ndarray) -> np.ndarray:
    """Transposes an array from NCHW to NHWC."""
    return array.transpose(0, 2, 3, 1)


def assert_close(
    actual: Any, expected: Any, label: str, relative: float = 1e-4, floor: float = 1e-6
) -> None:
    """Checks that the largest difference, relative to the largest expected value, is at most
    `relative`. Absolute differences up to `floor` are always allowed."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{label}: {actual.shape} is not {expected.shape}"
    difference = np.abs(actual.astype(np.float64) - expected).max()
    allowed = max(relative * np.abs(expected).max(), floor)
    assert difference <= allowed, f"{label}: {difference:.3g} is more than {allowed:.3g}"


def assert_trees_close(
    actual: Any, expected: Any, label: str, relative: float = 1e-4, floor: float = 1e-6
) -> None:
    """Applies `assert_close` to every leaf of two trees, which must have the same structure."""
    left, structure = jax.tree_util.tree_flatten_with_path(actual)
    right, other = jax.tree_util.tree_flatten_with_path(expected)
    assert structure == other, f"{label}: {structure} is not {other}"
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert_close(a, b, label + jax.tree_util.keystr(path), relative, floor)
