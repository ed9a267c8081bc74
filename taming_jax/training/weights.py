"""Initializing a run from the trained weights of another run."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.config.load import diff_configs
from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.weights.arrays import flatten_arrays

Name = tuple[str, ...]


class LoadedWeights(NamedTuple):
    """A run's initial state, with the names of the parameters that were loaded and of those that
    keep their random initialization."""

    state: Any
    loaded: list[Name]
    random: list[Name]


def load_matching_weights(
    learned: tuple[str, ...], template: Any, arrays: Mapping[Name, np.ndarray]
) -> LoadedWeights:
    """Returns a fresh state in which the `learned` networks have the weights of the same names and
    shapes from `arrays`. If `arrays` holds an EMA, both the parameters and the EMA start from it.
    Optimizer states are new."""
    result = LoadedWeights(None, [], [])
    leaves = []
    for path, leaf in flatten_arrays(template).items():
        source = path
        is_learned = path[0] == "nets" and path[1] in learned
        if is_learned and path[2] in ("params", "ema"):
            source = ("nets", path[1], "ema", *path[3:])
            if source not in arrays:
                source = ("nets", path[1], "params", *path[3:])
        # Averages and counts of the other run, such as LeCam's or a quantizer's, start anew.
        is_wanted = is_learned and (
            path[2] in ("params", "ema") or path[2:4] == ("extra", "batch_stats")
        )
        array = arrays.get(source) if is_wanted else None
        fits = array is not None and array.shape == leaf.shape
        if is_learned and path[2] == "params":
            (result.loaded if fits else result.random).append(path)
        # Copy each array, since the state is donated.
        leaves.append(np.array(array, leaf.dtype) if fits else np.asarray(leaf))
    return result._replace(state=jax.tree.unflatten(jax.tree.structure(template), leaves))


def describe_loaded(loaded: LoadedWeights, source: Path) -> str:
    """Returns a sentence that lists which weights were loaded and which are new. Raises UserError
    if none were loaded."""
    if not loaded.loaded:
        raise UserError(
            f"no weight in {source} has the name and shape of one in this run; set init-from to "
            "another run, or leave it out."
        )
    new = summarize_names(loaded.random) if loaded.random else "none"
    return (
        f"Starting from {source}. Arrays loaded: {summarize_names(loaded.loaded)}; initialized at "
        f"random: {new}."
    )


def summarize_names(paths: list[Name]) -> str:
    """Returns the number of arrays per module: "generator.encoder 54, generator.decoder 60"."""
    counts = collections.Counter(".".join((path[1], path[3])) for path in paths)
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def describe_mismatches(
    learned: tuple[str, ...],
    config: Config,
    frozen: Mapping[str, Any],
    other: Config,
    arrays: Mapping[Name, np.ndarray],
) -> list[str]:
    """Returns sentences about differences from the other run that change the meaning of weights of
    the same shapes: settings, or `frozen` networks, such as the generator whose codes the prior
    predicts."""
    sections = ("vqgan", "prior") if "transformer" in learned else ("vqgan",)
    phrases = diff_configs(config, other, sections, lambda f: bool(f.metadata.get("meaning")))
    sentences = [f"{phrase} as in the run that the weights come from." for phrase in phrases]
    if any(
        not np.array_equal(x, arrays.get(("nets", name, "params", *path), np.empty(0)))
        for name, params in frozen.items()
        for path, x in flatten_arrays(params).items()
    ):
        sentences.append(
            "the weights were trained on another stage 1, whose codes have different meanings."
        )
    return sentences
