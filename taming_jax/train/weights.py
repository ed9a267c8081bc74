"""A run that begins from trained weights: those of another run, or those it was imported with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.errors import UserError
from taming_jax.train.arrays import named_arrays

# What a stage learns; a prior's generator is the one of its own folder.
LEARNED = {"vqgan": ("generator", "discriminator"), "prior": ("transformer",)}
Name = tuple[str, ...]


class Begun(NamedTuple):
    """A state of a run's first step, and the names of its weights: those that were found, and those
    that are as random as ever."""

    state: Any
    kept: list[Name]
    new: list[Name]


def begun_from(stage: str, template: Any, arrays: Mapping[Name, np.ndarray]) -> Begun:
    """A fresh state with the weights, of the same names and shapes, of arrays by name. A moving
    average there is the better part, and both average and parameters begin as it; optimisers begin
    anew."""
    kept: list[Name] = []
    new: list[Name] = []
    leaves = []

    def found(path: Name) -> np.ndarray | None:
        if path[0] != "nets" or path[1] not in LEARNED[stage]:
            return None
        if path[2] in ("params", "ema"):
            rest = path[3:]
            better = arrays.get(("nets", path[1], "ema", *rest))
            return better if better is not None else arrays.get(("nets", path[1], "params", *rest))
        return arrays.get(path) if path[2:4] == ("extra", "batch_stats") else None

    for path, leaf in named_arrays(template).items():
        array = found(path)
        fits = array is not None and array.shape == leaf.shape
        if path[:1] == ("nets",) and path[1] in LEARNED[stage] and path[2] == "params":
            (kept if fits else new).append(path)
        # Each in memory of its own, since the state is donated.
        leaves.append(np.array(array, leaf.dtype) if fits else np.asarray(leaf))
    return Begun(jax.tree.unflatten(jax.tree.structure(template), leaves), kept, new)


def said(begun: Begun, source: Path) -> str:
    """What of a run's weights is kept and what is new, as a sentence. UserError where nothing is
    kept."""
    if not begun.kept:
        raise UserError(f"no weight of {source} has a name and shape of this run's; leave it out.")
    sentence = f"Begins from {source}: {len(begun.kept)} arrays of weights are kept"
    if not begun.new:
        return sentence + ", all there are."
    names = [".".join(path[1:2] + path[3:]) for path in begun.new]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{sentence}, and {len(names)} are new: {', '.join(names[:8])}{more}."
