"""The choice of a prior, and a small dataclass with the settings of each kind that has its own."""

from dataclasses import dataclass
from typing import ClassVar

from taming_jax.config.fields import HasKinds, KindSettings, setting


@dataclass(frozen=True)
class PriorKindConfig(KindSettings):
    """The settings of one kind of prior.

    decoding: The settings that commands and functions for sampling may override.
    """

    decoding: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class PriorConfigs(HasKinds):
    """The choice of a prior, and the settings of all kinds."""

    selector: ClassVar[str] = "kind"
    noun: ClassVar[str] = "prior"

    kind: str = setting("autoregressive", meaning=True)
    """The kind of prior: autoregressive. docs/priors.md compares them."""


# The settings class of each kind of prior by its name.
PRIOR_CONFIGS: dict[str, type[PriorKindConfig]] = {"autoregressive": PriorKindConfig}
