"""A pytree's arrays by their names: how they are saved, compared and brought back."""

import hashlib
from typing import Any

import jax
import numpy as np

from taming_jax.errors import UserError
from taming_jax.storage import hash_json


def named_arrays(tree: Any) -> dict[tuple[str, ...], Any]:
    """A pytree's leaves by the names on the way to them."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        raise TypeError(f"a pytree key of kind {type(key)}")

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(map(name, path)): leaf for path, leaf in leaves}


def digest(array: np.ndarray) -> str:
    """A hash of an array's type, shape and bytes."""
    found = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    # Its own memory, since an array may be a mapped file larger than what there is.
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def hash_arrays(tree: Any) -> str:
    """A hash of the names and arrays of a pytree, 16 hexadecimal digits."""
    named = named_arrays(tree)
    return hash_json({"/".join(path): digest(array) for path, array in named.items()})[:16]


def fill(template: Any, arrays: dict[tuple[str, ...], np.ndarray]) -> Any:
    """A pytree like `template` with arrays by name. UserError where a shape is another."""
    wanted = named_arrays(template)
    for path, leaf in wanted.items():
        if path not in arrays or arrays[path].shape != leaf.shape:
            found = arrays[path].shape if path in arrays else "missing"
            raise UserError(
                f"the checkpoint's array {'.'.join(path)} is {found}, but the settings make it "
                f"{leaf.shape}; it is of another version of this program."
            )
    leaves = [arrays[path] for path in wanted]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
