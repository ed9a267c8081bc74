"""Fingerprints of datasets, by which a resumed run and several processes recognize their data."""

from collections.abc import Callable
from typing import Any

import numpy as np

from taming_jax.data.datasets import Splits, evenly_spaced, find_untrained
from taming_jax.parallel import distributed
from taming_jax.weights.arrays import hash_arrays

MAX_HASHED_BYTES = 2**32  # of the images of a split; hashing them takes a few seconds


def compute_fingerprint(splits: Splits) -> dict[str, Any]:
    """Returns JSON-serializable values by which a resumed run recognizes its dataset.

    `means` holds the mean pixel values of some training and validation images. They differ between
    datasets, but a decoder version that rounds differently changes them by less than 1.
    """

    def compute_means(images: np.ndarray) -> list[float]:
        return [round(float(images[i].mean()), 2) for i in evenly_spaced(len(images), 64)]

    parts = {"training": splits.train, "validation": splits.validation}
    return {
        "images": {name: len(split.images) for name, split in parts.items()},
        "means": {name: compute_means(split.images) for name, split in parts.items()},
        "class_names": list(splits.class_names),
        "untrained_classes": find_untrained(splits),
    }


def hash_splits(splits: Splits) -> dict[str, str | None]:
    """Returns the hashes of all training and validation images with their labels, which show
    whether a single image has changed. A split of more than 4 GiB has None."""
    parts = {"training": splits.train, "validation": splits.validation}
    return {
        name: hash_arrays(split) if split.images.nbytes <= MAX_HASHED_BYTES else None
        for name, split in parts.items()
    }


def diff_fingerprints(now: dict[str, Any] | None, then: dict[str, Any] | None) -> list[str]:
    """Returns one phrase per difference between a current and an earlier fingerprint of a dataset.

    The list is empty if one of them is None, or if `then` comes from an imported run, which knows
    only the names of the classes.
    """
    phrases: list[str] = []
    if now is None or then is None or "images" not in then:
        return phrases
    for name, count in then["images"].items():
        if now["images"][name] != count:
            phrases.append(f"there are {now['images'][name]} {name} images, not {count}")
    names, old_names = now["class_names"], then["class_names"]
    if len(names) != len(old_names):
        phrases.append(f"there are {len(names)} classes, not {len(old_names)}")
    elif names != old_names:
        new, old = next(pair for pair in zip(names, old_names, strict=True) if pair[0] != pair[1])
        phrases.append(f"a class is called '{new}', not '{old}'")
    if not phrases:
        for name, means in then["means"].items():
            if max(np.abs(np.subtract(now["means"][name], means))) > 1:
                phrases.append(f"the {name} images are different")
    return phrases


def load_and_check(load: Callable[[], Splits]) -> tuple[Splits, dict[str, Any]]:
    """Loads a dataset in every process and returns it with its fingerprint.

    Raises UserError in all processes if one of them cannot load it or their fingerprints differ.
    """
    splits = distributed.run_on_all(load)
    own_fingerprint = compute_fingerprint(splits)
    advice = "Give all processes the same data with --data.path."
    distributed.check_equal(own_fingerprint, diff_fingerprints, advice)
    return splits, own_fingerprint
