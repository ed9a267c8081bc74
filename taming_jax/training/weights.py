"""A run that begins from trained weights: those of another run, or those it was imported with."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.config.validation import flag
from taming_jax.errors import UserError
from taming_jax.weights.arrays import named_arrays

# What changes a network's meaning, and not the shapes of its weights.
MEANING = {
    "vqgan": ("l2_normalise", "quantizer", "used_codes"),
    "prior": ("heads", "positions", "vocabulary", "first_class"),
}
Name = tuple[str, ...]


class Begun(NamedTuple):
    """A state of a run's first step, and the names of its weights: those that were found, and those
    that are as random as ever."""

    state: Any
    kept: list[Name]
    new: list[Name]


def begun_from(learned: tuple[str, ...], template: Any, arrays: Mapping[Name, np.ndarray]) -> Begun:
    """A fresh state whose `learned` networks have the weights, of the same names and shapes, of
    arrays by name. Where those have a moving average, average and parameters begin as it;
    optimisers begin anew."""
    kept: list[Name] = []
    new: list[Name] = []
    leaves = []

    def found(path: Name) -> np.ndarray | None:
        if path[0] != "nets" or path[1] not in learned:
            return None
        if path[2] in ("params", "ema"):
            rest = path[3:]
            better = arrays.get(("nets", path[1], "ema", *rest))
            return better if better is not None else arrays.get(("nets", path[1], "params", *rest))
        return arrays.get(path) if path[2:4] == ("extra", "batch_stats") else None

    for path, leaf in named_arrays(template).items():
        array = found(path)
        fits = array is not None and array.shape == leaf.shape
        if path[:1] == ("nets",) and path[1] in learned and path[2] == "params":
            (kept if fits else new).append(path)
        # Each in memory of its own, since the state is donated.
        leaves.append(np.array(array, leaf.dtype) if fits else np.asarray(leaf))
    return Begun(jax.tree.unflatten(jax.tree.structure(template), leaves), kept, new)


def said(begun: Begun, source: Path) -> str:
    """What of a run's weights is kept and what is new, as a sentence. UserError where nothing is
    kept."""
    if not begun.kept:
        raise UserError(f"no weight of {source} has a name and shape of this run's; leave it out.")
    new = f"new: {listed(begun.new)}" if begun.new else "nothing is new"
    return f"Begins from {source}: of its weights are kept {listed(begun.kept)}; {new}."


def listed(paths: list[Name]) -> str:
    """How many arrays of which modules: "generator.encoder 54, generator.decoder 60"."""
    counts = collections.Counter(".".join((path[1], path[3])) for path in paths)
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def begun_whole(
    learned: tuple[str, ...], template: Any, arrays: Mapping[Name, np.ndarray], source: Path
) -> Begun:
    """The same of weights that the run in a folder was imported with. UserError where some of them
    have no place in it."""
    begun = begun_from(learned, template, arrays)
    kept = set(begun.kept)
    for path in arrays:
        if path[1:2] and path[1] in learned and path[2] == "params" and path not in kept:
            raise UserError(
                f"the settings leave no room for the imported array {'.'.join(path)}; take those "
                f"of {source}/config.json."
            )
    return begun


def other_meanings(
    learned: tuple[str, ...],
    config: Config,
    template: Any,
    other: Config,
    arrays: Mapping[Name, np.ndarray],
) -> list[str]:
    """What makes weights of the same shapes mean something else, a sentence each: settings of
    another run, or another generator, whose codes its prior spoke."""
    found = []
    for section, names in MEANING.items():
        for name in names:
            here, there = (getattr(getattr(x, section), name) for x in (config, other))
            if here != there and (section == "vqgan" or "transformer" in learned):
                found.append(f"{flag(section, name)} was {there} there, and is {here} here.")
    others = [
        path for path, leaf in named_arrays(template).items()
        if path[:3] == ("nets", "generator", "params") and path[1] not in learned
        and (path not in arrays or not np.array_equal(np.asarray(leaf), arrays[path]))
    ]  # fmt: skip
    if others:
        found.append("those weights spoke the codes of another stage 1, which mean something else.")
    return found
