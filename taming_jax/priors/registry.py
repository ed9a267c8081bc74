"""The priors by name, and what the rest of the program needs of one."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from taming_jax.config.schema import Config
from taming_jax.priors.autoregressive import GPT


class Prior(Protocol):
    """What a prior needs to have: a Linen module of these, listed in `PRIORS`.

    It is initialized by tokens int32 [b,t]. Codes are int32 in raster order, labels int32 [b] are
    classes from 0, and `classes` itself stands for no class. Each method is a pure function of the
    parameters, for use inside `jit`.
    """

    codebook_size: int
    classes: int
    grid: tuple[int, int]
    """Height and width of the training images' grids of codes."""

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the smallest grid that it draws."""

    @classmethod
    def build(cls, config: Config, classes: int) -> "Prior":
        """The prior that a config describes, for a dataset with that many classes."""

    def init(self, rngs: Any, tokens: Any) -> Any:
        """Fresh variables, as of any Linen module."""

    def check_trainable(self) -> None:
        """Raises UserError where this prior can draw codes but cannot be trained."""

    def loss(
        self, params: Any, labels: jax.Array, codes: jax.Array, keys: Mapping[str, jax.Array]
    ) -> jax.Array:
        """The training loss, float32 [b], of codes [b,t]. `keys` hold one key [b] per example for
        each purpose, "dropout" and "codes"."""

    def evaluate(self, params: Any, labels: jax.Array, codes: jax.Array) -> dict[str, jax.Array]:
        """The metrics of a validation of codes [b,t], float32 [b] each: "nll", by which the best
        checkpoint is chosen, in nats per code, and others."""

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
    ) -> jax.Array:
        """Grids of codes [b,h,w], with one key [b] per image; see `GPT.sample`."""

    def log_likelihood(self, params: Any, labels: jax.Array, codes: jax.Array) -> jax.Array:
        """The logarithm of the probability, in nats, float32 [b], of grids of codes [b,h,w], as
        large as the window."""


PRIORS: dict[str, type[Prior]] = {"autoregressive": GPT}


def build_prior(config: Config, classes: int) -> Prior:
    """The prior that a config describes, for a dataset with that many classes."""
    return PRIORS[config.prior.kind].build(config, classes)
