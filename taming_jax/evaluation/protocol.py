"""The settings of an evaluation, which import nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taming_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a run is measured. Raises UserError for numbers and splits that are not possible."""

    split: str = "test"
    """Whose images are reconstructed and compared with samples: train, validation or test."""
    images: int | None = None
    """How many of the split, evenly spread. Default: all."""
    samples: int = 5000
    """How many are drawn, with classes as frequent as in the split; 0 leaves them out."""
    features: str = "auto"
    """inception, vgg or classifier; auto is inception where its weights are, else vgg."""
    weights: Path | None = None
    """InceptionV3's, pytorch-fid's .pth, where that is not in the cache."""
    reference: Path | None = None
    """An .npz of mu and sigma, in place of the split's."""
    legacy_resize: bool = False
    """Bilinear without antialiasing, as the first FID."""
    kept: int = 10_000
    """The most features of a set that KD, precision, recall, density and coverage hold."""
    neighbours: int = 5
    """Of each image, for precision, recall, density and coverage."""
    seed: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | tuple[float, float] | None = None
    """One number, or two: the first code's and the last's."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `Run.sampling`. What is None there is as in the run's config."""
        names = ("temperature", "top_k", "top_p", "guidance_scale", "seed")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("images", 1), ("kept", 2), ("neighbours", 1)):
            value = getattr(self, name)
            if value is not None and value < least and (name, value) != ("samples", 0):
                raise UserError(f"{name} is {value}; it must be {least} or more.")
        if self.split not in ("train", "validation", "test"):
            raise UserError(f"there is no split '{self.split}'; take train, validation or test.")
