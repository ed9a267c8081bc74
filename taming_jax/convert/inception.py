"""The weights of the Fréchet inception distance, as pytorch-fid gives them out, as variables of
ours (pt_inception-2015-12-05-6726825d.pth, of github.com/mseitzer/pytorch-fid's releases)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from taming_jax.convert.compvis import leaf


def inception_variables(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`params` and `batch_stats` of `InceptionV3` from a FIDInceptionV3's state dict. ValueError
    for what is none: arrays by dotted names."""
    if not isinstance(state_dict, Mapping):
        raise ValueError("it is no state dict")
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, array in state_dict.items():
        *path, last = str(name).split(".")
        if not path or not isinstance(array, np.ndarray):
            raise ValueError(f"'{name}' is no array of a network")
        if path[0] == "AuxLogits" or last == "num_batches_tracked":
            continue
        if last.startswith("running_"):
            flat["batch_stats", *path, last.removeprefix("running_")] = np.asarray(array)
            continue
        key, value = leaf(last, array)
        flat["params", *path, key] = value
    return traverse_util.unflatten_dict(flat)
