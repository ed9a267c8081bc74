"""The networks that a stage uses but does not train, stored once for all its checkpoints."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import UserError
from taming_jax.storage import read_arrays, write_arrays
from taming_jax.weights.arrays import flatten_arrays, hash_arrays


class FrozenNetworks:
    """The frozen networks in a folder: one file `HASH.npz` per network, named by the hash of its
    arrays. `networks` holds the parameters of those that checkpoints will refer to, by name."""

    def __init__(self, folder: Path, networks: Mapping[str, Any]):
        self._folder, self._networks = folder, networks
        self.hashes = {name: hash_arrays(params) for name, params in networks.items()}
        """The hash of each network, for the metadata of checkpoints."""

    def _locate(self, key: str) -> Path:
        return self._folder / f"{key}.npz"

    def write(self) -> None:
        """Writes the networks that have no file yet. Raises OSError if one cannot be written."""
        for name, params in self._networks.items():
            file = self._locate(self.hashes[name])
            if not file.exists():
                arrays = flatten_arrays(params)
                write_arrays(file, {"/".join(path): np.asarray(x) for path, x in arrays.items()})

    def read(self, hashes: Mapping[str, str]) -> dict[tuple[str, ...], np.ndarray]:
        """Returns the arrays of the networks with these hashes, named like those of a state. Raises
        UserError if a file is missing or damaged."""
        arrays: dict[tuple[str, ...], np.ndarray] = {}
        for name, key in hashes.items():
            file = self._locate(key)
            content = read_arrays(file)
            if content is None or hash_arrays(content) != key:
                problem = "damaged" if file.exists() else "missing"
                raise UserError(
                    f"{file} is {problem}; it is the {name} of the checkpoints in "
                    f"{self._folder.parent}. Restore this file from a backup or a copy of the run."
                )
            arrays |= {("nets", name, "params", *path.split("/")): x for path, x in content.items()}
        return arrays

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes the files of the networks with these hashes."""
        for key in keys:
            self._locate(key).unlink(missing_ok=True)
