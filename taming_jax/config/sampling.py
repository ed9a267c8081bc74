"""The settings for sampling, as commands take them. This module has no heavy imports."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to draw codes. None means the value of the run's config."""

    temperature: float | None = None
    """The sampling temperature; 0 takes the most likely codes. Default: the run's."""
    top_k: int | None = None
    """The number of most likely codes to draw from. Default: the run's."""
    top_p: float | None = None
    """Draw from the smallest set of most likely codes whose probabilities sum to at least this.
    Default: the run's."""
    guidance_scale: tuple[float, ...] = ()
    """1 is no guidance, 2 is strong; two numbers are the scales of the first and the last code.
    Default: the run's."""
    decoding_steps: int | None = None
    """The number of passes of a masked prior. Default: the run's."""
    decoding_order: Literal["confidence", "halton"] | None = None
    """The codes that a masked prior keeps first. Default: the run's."""
    choice_temperature: float | None = None
    """The noise of a masked prior's confidences. Default: the run's."""
    seed: int = 0
    """The seed of all random numbers."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings by name, for `Sampler.draw`."""
        values = {name: getattr(self, name) for name in SamplingSettings.__dataclass_fields__}
        scale = self.guidance_scale
        if isinstance(scale, tuple):
            values["guidance_scale"] = scale[0] if len(scale) == 1 else scale or None
        return values
