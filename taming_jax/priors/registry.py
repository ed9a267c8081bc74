"""The registry of priors, and the interface that the rest of the program uses."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from taming_jax.config.schema import Config
from taming_jax.priors.autoregressive import GPT
from taming_jax.priors.decoding import Samples
from taming_jax.priors.masked import MaskedTransformer
from taming_jax.priors.random_order import RandomOrderGPT


class Prior(Protocol):
    """The interface of a prior: a Linen module, listed in `PRIORS`.

    `init` takes tokens int32 [b,t]. Codes are int32 in raster order. Labels int32 [b] are classes
    from 0, where the label `classes` means no class. Each method is a pure function of the
    parameters, for use inside `jit`.
    """

    codebook_size: int
    classes: int
    grid: tuple[int, int]
    """The height and width of the grids of codes of the training images."""

    @property
    def window(self) -> tuple[int, int]:
        """The height and width of the smallest grid that the prior samples."""

    @property
    def completion_limits(self) -> str:
        """A sentence on the known codes that `sample` does not use, or does not take, or an empty
        string."""

    @property
    def logits_per_image(self) -> int:
        """The number of logits that `sample` computes at once per image, which limits the number of
        images that are sampled at once."""

    @classmethod
    def build(cls, config: Config, classes: int) -> "Prior":
        """Builds the prior that a config describes, for a dataset with `classes` classes."""

    def init(self, rngs: Any, tokens: Any) -> Any:
        """Returns new variables, as in any Linen module."""

    def check_trainable(self) -> None:
        """Raises UserError if this prior cannot be trained."""

    def check_likelihood(self, grid: tuple[int, int]) -> None:
        """Raises UserError if `log_likelihood` is not defined for grids of codes of this size."""

    def check_drawing(self, grid: tuple[int, int], known: Any) -> None:
        """Raises UserError if `sample` cannot draw grids of this size with these known codes, int
        [n,p] in raster order, -1 for codes to sample."""

    def loss(
        self,
        params: Any,
        labels: jax.Array,
        codes: jax.Array,
        keys: Mapping[str, jax.Array],
        progress: jax.Array | float,
    ) -> jax.Array:
        """Returns the training loss, float32 [b], for codes [b,t]. `keys` maps "dropout" and
        "codes" to one key per example [b]. `progress` is the fraction of the run that is over."""

    def evaluate(self, params: Any, labels: jax.Array, codes: jax.Array) -> dict[str, jax.Array]:
        """Returns the validation metrics of codes [b,t], float32 [b] each. One of them is "nll" in
        nats per code, which selects the best checkpoint."""

    def sample(
        self,
        params: Any,
        labels: jax.Array,
        keys: jax.Array,
        *,
        temperature: jax.Array | float = 1.0,
        top_k: int | None = None,
        top_p: jax.Array | float | None = None,
        guidance_scale: jax.Array | float | None = None,
        known: jax.Array | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Samples:
        """Samples grids of codes, with one key per image [b]; see `GPT.sample`. The
        settings that `PriorKindConfig.decoding` names are further keyword arguments, by default
        those of the config."""

    def log_likelihood(self, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """Returns the log-likelihood in nats, float32 [b], of grids of codes [b,h,w] that are as
        large as the window. Not called if `check_likelihood` raises UserError."""


PRIORS: dict[str, type[Prior]] = {
    "autoregressive": GPT, "masked": MaskedTransformer, "random-order": RandomOrderGPT,
}  # fmt: skip


def build_prior(config: Config, classes: int) -> Prior:
    """Builds the prior that a config describes, for a dataset with `classes` classes."""
    return PRIORS[config.prior.kind].build(config, classes)
