"""Names, hashes and restores the arrays of a pytree, for checkpoints."""

import hashlib
from typing import Any

import jax
import numpy as np

from taming_jax.errors import UserError
from taming_jax.storage import hash_json


def flatten_arrays(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns a pytree's leaves, keyed by path: a tuple of names."""

    def get_name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        raise TypeError(f"pytree keys of type {type(key)} are not supported")

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(map(get_name, path)): leaf for path, leaf in leaves}


def digest(array: np.ndarray) -> str:
    """Returns a hash of an array's dtype, shape and bytes."""
    sha256 = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    # Makes no copy, since a memory-mapped array may be larger than the RAM.
    sha256.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def hash_arrays(tree: Any) -> str:
    """Returns a hash of a pytree's names and arrays: 16 hexadecimal digits."""
    arrays = flatten_arrays(tree)
    return hash_json({"/".join(path): digest(array) for path, array in arrays.items()})[:16]


def fill(template: Any, arrays: dict[tuple[str, ...], np.ndarray]) -> Any:
    """Returns a pytree with the structure of `template` and the leaves `arrays`, keyed by path.

    Raises UserError if an array is missing or has another shape.
    """
    leaves = flatten_arrays(template)
    for path, leaf in leaves.items():
        if path not in arrays or arrays[path].shape != leaf.shape:
            name = ".".join(path)
            actual = f"has shape {arrays[path].shape}" if path in arrays else "is missing"
            raise UserError(
                f"the checkpoint's array {name} {actual}, but the settings require {leaf.shape}; "
                "another version of this program wrote it, so resume with that version."
            )
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[path] for path in leaves])
