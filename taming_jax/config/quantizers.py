"""The settings of the quantizers: those that all share, and a small dataclass for each."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from taming_jax.config.fields import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    HasKinds,
    KindSettings,
    Range,
    setting,
)
from taming_jax.errors import UserError

# 2^24 probabilities take 64 MiB.
GROUP_BITS = Range(lambda x: 1 <= x <= 24, "must be from 1 to 24")
MAX_LEVELS = 256  # of a dimension of fsq


@dataclass(frozen=True)
class QuantizerConfig(KindSettings):
    """The settings of one quantizer."""

    def check(self, codebook_size: int) -> None:
        """Raises UserError if the settings conflict, or do not fit the size of the codebook."""


@dataclass(frozen=True)
class NearestConfig(QuantizerConfig):
    """The settings of quantizers that choose the nearest code."""

    commitment: float = setting(0.25, NOT_NEGATIVE)
    """The weight of the commitment loss (beta in the papers)."""
    l2_normalise: bool = setting(False, meaning=True)
    """Normalize latents and codes to length one, so that only their directions are compared."""
    rotation_trick: bool = False
    """Pass the gradient to the latent through the rotation that maps it to its code, instead of
    straight through."""


@dataclass(frozen=True)
class RestartConfig(NearestConfig):
    """The settings of quantizers whose unused codes can be restarted."""

    restart_after: int | None = setting(None, COUNT)
    """The number of steps after which a code that no latent has used is replaced by a random latent
    of the batch. Default: never."""


@dataclass(frozen=True)
class EntropyConfig(QuantizerConfig):
    """The settings of the entropy penalty, E[H(p)] - diversity_weight * H(E[p])."""

    entropy_weight: float = setting(0.0, NOT_NEGATIVE)
    """The weight of the entropy penalty, which makes each choice of a code certain and all codes
    used. It applies in training only."""
    diversity_weight: float = setting(1.0, NOT_NEGATIVE)
    """The weight, within the entropy penalty, of the entropy of the batch's mean distribution."""
    entropy_temperature: float = setting(0.01, POSITIVE)
    """The temperature of the softmax from which the entropy penalty takes its probabilities."""


@dataclass(frozen=True)
class VQConfig(RestartConfig, EntropyConfig):
    """The nearest code of a learned codebook (VQ-VAE)."""

    legacy_commitment: bool = False
    """Apply the commitment weight to the codebook loss instead, as the official code does by
    default."""


@dataclass(frozen=True)
class GumbelConfig(QuantizerConfig):
    """A code drawn with the Gumbel-softmax trick."""

    temperature: tuple[float, float] = (1.0, 1 / 16)
    """The temperature of the Gumbel-softmax at the first and the last step, with a cosine schedule
    between them."""
    kl_weight: float = setting(5e-4, NOT_NEGATIVE)
    """The weight of the KL divergence between the distribution of codes and the uniform
    distribution."""

    def check(self, codebook_size: int) -> None:
        if min(self.temperature) <= 0:
            raise UserError("--vqgan.gumbel.temperature must be two numbers above 0.")


@dataclass(frozen=True)
class EMAConfig(RestartConfig):
    """The nearest code of a codebook of moving averages."""

    decay: float = setting(0.99, FRACTION)
    """The decay of the moving averages of the latents that use a code."""


@dataclass(frozen=True)
class FSQConfig(QuantizerConfig):
    """Finite scalar quantization: each dimension is rounded to a few levels."""

    levels: tuple[int, ...] | None = setting(None, meaning=True)
    """The number of levels of each dimension, whose product is --vqgan.codebook-size. Default: as
    many levels of 5 or more as possible."""

    # The quantizer itself determines the dimension of its codes.
    unused: ClassVar[tuple[str, ...]] = ("code_dim",)

    def resolve_levels(self, codebook_size: int) -> tuple[int, ...]:
        """Returns the levels, which by default follow from the number of codes."""
        if self.levels is not None:
            return self.levels
        # The paper recommends levels of 5 or more, the largest first.
        choices = list(factorize(codebook_size, 5))
        return max(choices, key=lambda levels: (len(levels), -max(levels)))[::-1]

    def check(self, codebook_size: int) -> None:
        levels = self.resolve_levels(codebook_size)
        given = " ".join(map(str, levels))
        # With two levels, the bound is flat at zero, so that the latents hardly have a gradient.
        # With 1,000 or more, it would reach beyond the last level.
        is_valid = bool(levels) and min(levels) >= 3 and max(levels) <= MAX_LEVELS
        if self.levels is None and not is_valid:
            raise UserError(
                f"--vqgan.codebook-size {codebook_size} is not a product of numbers from 5 to "
                f"{MAX_LEVELS}, which fsq requires; use another size, such as 1000 or 1024."
            )
        if not is_valid:
            raise UserError(
                f"--vqgan.fsq.levels is {given or 'empty'}; give one number per dimension, each "
                f"from 3 to {MAX_LEVELS}."
            )
        if math.prod(levels) != codebook_size:
            raise UserError(
                f"--vqgan.fsq.levels {given} give {math.prod(levels)} codes, but "
                f"--vqgan.codebook-size is {codebook_size}. Set both to the same number of codes, "
                "or leave out --vqgan.fsq.levels."
            )


def factorize(number: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """Yields the ways to write a number as a product of factors of at least `smallest`, in
    ascending order. The number itself is always one of them."""
    yield (number,)
    for factor in range(smallest, math.isqrt(number) + 1):
        if number % factor == 0:
            for factors in factorize(number // factor, factor):
                yield (factor, *factors)


@dataclass(frozen=True)
class BitsConfig(EntropyConfig):
    """The settings of quantizers with one bit per dimension."""

    entropy_weight: float = setting(0.1, NOT_NEGATIVE)
    """The weight of the entropy penalty, which makes each bit certain and all codes used. It
    applies in training only."""
    commitment: float = setting(0.25, NOT_NEGATIVE)
    """The weight of the commitment loss (beta in the papers)."""

    # The quantizer itself determines the dimension of its codes.
    unused: ClassVar[tuple[str, ...]] = ("code_dim",)

    def check(self, codebook_size: int) -> None:
        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            raise UserError(
                f"--vqgan.codebook-size is {codebook_size}; it must be a power of two, since lfq "
                "and bsq have one bit per dimension."
            )


@dataclass(frozen=True)
class LFQConfig(BitsConfig):
    """Lookup-free quantization: the signs of the dimensions."""

    entropy_group_bits: int = setting(18, GROUP_BITS)
    """The largest number of bits whose joint distribution the entropy penalty computes. The
    entropies of several groups of bits are summed."""


@dataclass(frozen=True)
class BSQConfig(BitsConfig):
    """Binary spherical quantization: the signs of a vector of length one. The defaults are those of
    the authors' models of 18 bits."""

    commitment: float = setting(0.0, NOT_NEGATIVE)
    """The weight of the commitment loss, which bounded latents do not need."""
    entropy_temperature: float = setting(1.0, POSITIVE)
    """The temperature of the softmax from which the entropy penalty takes its probabilities."""


@dataclass(frozen=True)
class SimVQConfig(NearestConfig):
    """The nearest code of a fixed random codebook under a learned linear map."""


@dataclass(frozen=True)
class IBQConfig(EntropyConfig):
    """The code with the largest product with the latent, trained through the softmax of all."""

    entropy_weight: float = setting(0.05, NOT_NEGATIVE)
    """The weight of the entropy penalty, which makes each choice of a code certain and all codes
    used. It applies in training only."""
    commitment: float = setting(0.25, NOT_NEGATIVE)
    """The weight of the term of the loss that moves the code to the latent (beta in the official
    code)."""
    l2_normalise: bool = setting(False, meaning=True)
    """Normalize latents and codes to length one. Use it for codes of few dimensions, among which
    the longest have the largest product with most latents."""


@dataclass(frozen=True)
class QuantizerConfigs(HasKinds):
    """The choice of a quantizer, and the settings of all quantizers."""

    selector: ClassVar[str] = "quantizer"
    noun: ClassVar[str] = "quantizer"

    quantizer: str = setting("vq", meaning=True)
    """The quantizer, which turns latents into codes: vq, gumbel, ema, fsq, lfq, bsq, simvq or ibq.
    docs/quantizers.md compares them."""
    codebook_size: int = setting(1024, COUNT)
    """The number of codes."""
    code_dim: int = setting(256, COUNT)
    """The dimension of a code, for quantizers that do not set it themselves, as fsq does."""
    vq: VQConfig = VQConfig()
    gumbel: GumbelConfig = GumbelConfig()
    ema: EMAConfig = EMAConfig()
    fsq: FSQConfig = FSQConfig()
    lfq: LFQConfig = LFQConfig()
    bsq: BSQConfig = BSQConfig()
    simvq: SimVQConfig = SimVQConfig()
    ibq: IBQConfig = IBQConfig()


# The settings class of each quantizer by its name.
QUANTIZER_CONFIGS: dict[str, type[QuantizerConfig]] = {
    field.name: type(field.default) for field in dataclasses.fields(QuantizerConfigs)
    if isinstance(field.default, QuantizerConfig)
}  # fmt: skip
