"""The choice of a prior, and a small dataclass with the settings of each kind that has its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from taming_jax.config.fields import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    HasKinds,
    KindSettings,
    free,
    setting,
)
from taming_jax.errors import UserError


@dataclass(frozen=True)
class PriorKindConfig(KindSettings):
    """The settings of one kind of prior.

    decoding: The settings that commands and functions for sampling may override.
    """

    decoding: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Raises UserError if the settings conflict."""


@dataclass(frozen=True)
class MaskedConfig(PriorKindConfig):
    """The settings of the masked prior."""

    label_smoothing: float = setting(0.1, FRACTION)
    """The share of a uniform distribution in the targets, as in MaskGIT."""
    decoding_steps: int = free(8, COUNT)
    """The number of passes in which the codes of an image are drawn."""
    decoding_order: Literal["confidence", "halton"] = free("confidence")
    """The codes to keep in each pass: those that the prior is surest of, or the next ones of a
    Halton sequence, which spreads over the image."""
    choice_temperature: float = free(4.5, NOT_NEGATIVE)
    """The factor of the random noise that is added to confidences. It falls to 0 over the passes.
    More noise means more variety."""

    unused: ClassVar[tuple[str, ...]] = (
        "block_size", "vocabulary", "first_class", "token_keep_prob",
    )  # fmt: skip
    decoding: ClassVar[tuple[str, ...]] = (
        "decoding_steps", "decoding_order", "choice_temperature",
    )  # fmt: skip


@dataclass(frozen=True)
class RandomOrderConfig(PriorKindConfig):
    """The settings of the random-order prior."""

    anneal_start: float = setting(0.5, FRACTION)
    """The fraction of the run until which all examples have a random order."""
    anneal_end: float = setting(0.75, FRACTION)
    """The fraction of the run from which on only --prior.random-order.final-share of the examples
    has a random order, and the others the raster order."""
    final_share: float = setting(0.0, FRACTION)
    """The share of examples in random order at the end. Above 0, the prior can complete pictures
    whose kept parts are anywhere."""

    unused: ClassVar[tuple[str, ...]] = ("block_size",)

    def check(self) -> None:
        if self.anneal_start > self.anneal_end:
            raise UserError(
                f"--prior.random-order.anneal-start {self.anneal_start} is after "
                f"--prior.random-order.anneal-end {self.anneal_end}; set it to at most that."
            )


@dataclass(frozen=True)
class PriorConfigs(HasKinds):
    """The choice of a prior, and the settings of all kinds."""

    selector: ClassVar[str] = "kind"
    noun: ClassVar[str] = "prior"

    kind: str = setting("autoregressive", meaning=True)
    """The kind of prior: autoregressive, masked or random-order. docs/priors.md compares them."""
    masked: MaskedConfig = MaskedConfig()
    random_order: RandomOrderConfig = RandomOrderConfig()


# The settings class of each kind of prior by its name.
PRIOR_CONFIGS: dict[str, type[PriorKindConfig]] = {
    "autoregressive": PriorKindConfig, "masked": MaskedConfig,
    "random-order": RandomOrderConfig,
}  # fmt: skip
