"""What is asked of an evaluation."""

import dataclasses
from pathlib import Path

from taming_jax.errors import UserError

SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")  # the settings of `Run.sampling`


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a run is measured."""

    split: str = "test"
    """The split whose images are reconstructed, and whose features samples are held against."""
    images: int | None = None
    """How many of its images, evenly spread; all where None."""
    samples: int = 5000
    """How many are drawn, with classes as frequent as in the split; 0 skips samples."""
    features: str = "auto"
    """inception, vgg, classifier; auto takes InceptionV3 where its weights are, else VGG16."""
    weights: Path | None = None
    """InceptionV3's file, where it is not in the cache."""
    reference: Path | None = None
    """Moments of a reference, an .npz of mu and sigma, in place of the split's."""
    legacy_resize: bool = False
    """Bilinear without antialiasing, as the first FID."""
    kept: int = 10_000
    """The most features of a set that KD, precision, recall, density and coverage hold."""
    neighbours: int = 5
    seed: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | tuple[float, float] | None = None


def checked(protocol: Protocol) -> Protocol:
    """A protocol with its files as paths. UserError for numbers and splits that cannot be."""
    for name, least in (("samples", 2), ("images", 1), ("kept", 2), ("neighbours", 1)):
        value = getattr(protocol, name)
        if (name, value) == ("samples", 0):
            continue
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more.")
    if protocol.split not in ("train", "validation", "test"):
        raise UserError(f"there is no split '{protocol.split}'; take train, validation or test.")
    return dataclasses.replace(
        protocol, weights=protocol.weights and Path(protocol.weights),
        reference=protocol.reference and Path(protocol.reference),
    )  # fmt: skip
