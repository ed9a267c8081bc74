"""The networks that a stage uses but does not train, such as the generator under a prior. They are
stored once for all checkpoints of the stage, in `checkpoints/NAME/frozen/HASH.npz`."""

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
        self._intact: set[str] = set()

    def _locate(self, key: str) -> Path:
        return self._folder / f"{key}.npz"

    def _load(self, key: str) -> dict[str, np.ndarray] | None:
        """Returns the content of a file, or None if the file is missing or damaged."""
        content = read_arrays(self._locate(key))
        return None if content is None or hash_arrays(content) != key else content

    def write(self) -> None:
        """Writes the networks whose file is missing, or damaged when this is called for the first
        time. Raises OSError if one cannot be written."""
        for name, params in self._networks.items():
            key = self.hashes[name]
            file = self._locate(key)
            if not (file.exists() if key in self._intact else self._load(key)):
                arrays = flatten_arrays(params)
                write_arrays(file, {"/".join(path): np.asarray(x) for path, x in arrays.items()})
            self._intact.add(key)

    def read(self, hashes: Mapping[str, str]) -> dict[tuple[str, ...], np.ndarray]:
        """Returns the arrays of the networks with these hashes, named like those of a state. Raises
        UserError if a file is missing or damaged."""
        arrays: dict[tuple[str, ...], np.ndarray] = {}
        for name, key in hashes.items():
            content, file = self._load(key), self._locate(key)
            if content is None:
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
