"""The settings of an evaluation. This module has no heavy imports."""

from dataclasses import dataclass
from pathlib import Path

from taming_jax.config.sampling import SamplingSettings
from taming_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Protocol(SamplingSettings):
    """The settings of an evaluation. Raises UserError if a number or the split is invalid."""

    split: str = "test"
    """The split to reconstruct and to compare samples with: train, validation or test."""
    images: int | None = None
    """The number of images of the split to use, evenly spaced. Default: all."""
    samples: int = 5000
    """The number of samples, with classes as frequent as in the split; 0 skips samples."""
    features: str = "auto"
    """inception, vgg or classifier; auto is inception if its weights are available, else vgg."""
    weights: Path | None = None
    """pytorch-fid's .pth with the weights of InceptionV3. Default: the one in the cache, into which
    --features inception downloads it."""
    reference: Path | None = None
    """An .npz of mu and sigma to compare with. Default: mu and sigma of the split."""
    legacy_resize: bool = False
    """Resize bilinearly without antialiasing, as the original FID does."""
    kept: int = 10_000
    """The maximum number of images per set for KD, precision, recall, density, coverage and the
    search for nearest training images."""
    neighbours: int = 5
    """The number of nearest neighbors for precision, recall, density and coverage."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("images", 1), ("kept", 2), ("neighbours", 1)):
            value = getattr(self, name)
            if value is not None and value < least and (name, value) != ("samples", 0):
                zero = "0, or " if name == "samples" else ""
                raise UserError(f"{name} is {value}; it must be {zero}{least} or more.")
        if self.split not in ("train", "validation", "test"):
            raise UserError(f"there is no split '{self.split}'; choose train, validation or test.")
