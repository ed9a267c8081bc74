"""A run that starts from trained weights, instead of random ones."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.config.load import differences
from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.weights.arrays import flatten_arrays

Name = tuple[str, ...]


class Loaded(NamedTuple):
    """A state of a run's first step, the names of its parameters that were loaded, and of those
    that are still random."""

    state: Any
    loaded: list[Name]
    random: list[Name]


def load_matching_weights(
    learned: tuple[str, ...], template: Any, arrays: Mapping[Name, np.ndarray]
) -> Loaded:
    """A fresh state whose `learned` networks get the weights of the same names and shapes. Where
    there is a moving average of these, average and parameters both start as it; optimizers start
    anew."""
    result = Loaded(None, [], [])
    leaves = []
    for path, leaf in flatten_arrays(template).items():
        source = path
        is_learned = path[0] == "nets" and path[1] in learned
        if is_learned and path[2] in ("params", "ema"):
            source = ("nets", path[1], "ema", *path[3:])
            if source not in arrays:
                source = ("nets", path[1], "params", *path[3:])
        is_wanted = is_learned and (path[2] != "opt_state") and path[2:4] != ("extra", "lecam")
        array = arrays.get(source) if is_wanted else None
        fits = array is not None and array.shape == leaf.shape
        if is_learned and path[2] == "params":
            (result.loaded if fits else result.random).append(path)
        # Each in memory of its own, since the state is donated.
        leaves.append(np.array(array, leaf.dtype) if fits else np.asarray(leaf))
    return result._replace(state=jax.tree.unflatten(jax.tree.structure(template), leaves))


def describe_loaded(loaded: Loaded, source: Path) -> str:
    """Which weights were loaded and which are new, as a sentence. Raises UserError where none were
    loaded."""
    if not loaded.loaded:
        raise UserError(f"no weight of {source} has a name and shape of this run's; leave it out.")
    new = f"new: {listed(loaded.random)}" if loaded.random else "nothing is new"
    return f"Begins from {source}: of its weights are kept {listed(loaded.loaded)}; {new}."


def listed(paths: list[Name]) -> str:
    """How many arrays of which modules: "generator.encoder 54, generator.decoder 60"."""
    counts = collections.Counter(".".join((path[1], path[3])) for path in paths)
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def describe_other_meaning(
    learned: tuple[str, ...],
    config: Config,
    template: Any,
    other: Config,
    arrays: Mapping[Name, np.ndarray],
) -> list[str]:
    """What makes weights of the same shapes mean something else, as sentences: settings of another
    run, or another generator, whose codes its prior predicted."""
    sections = ("vqgan", "prior") if "transformer" in learned else ("vqgan",)
    phrases = differences(config, other, sections, lambda f: bool(f.metadata.get("meaning")))
    sentences = [f"{phrase} as in the run of those weights." for phrase in phrases]
    frozen = {
        path: leaf for path, leaf in flatten_arrays(template).items()
        if path[0] == "nets" and path[1] not in learned and path[2] == "params"
    }  # fmt: skip
    if any(not np.array_equal(x, arrays.get(path, np.empty(0))) for path, x in frozen.items()):
        sentences.append(
            "those weights predicted the codes of another stage 1, which mean something else."
        )
    return sentences
