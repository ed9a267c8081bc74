"""Quantizers, which map latents to codes, and indices back to codes. docs/quantizers.md compares
them."""

from taming_jax.models.quantizers.bsq import BSQQuantizer
from taming_jax.models.quantizers.ema import EMAQuantizer
from taming_jax.models.quantizers.fsq import FSQQuantizer
from taming_jax.models.quantizers.gumbel import GumbelQuantizer
from taming_jax.models.quantizers.ibq import IBQQuantizer
from taming_jax.models.quantizers.interface import (
    Quantized,
    Quantizer,
    Training,
    straight_through,
)
from taming_jax.models.quantizers.lfq import LFQQuantizer
from taming_jax.models.quantizers.simvq import SimVQQuantizer
from taming_jax.models.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "gumbel": GumbelQuantizer,
    "ema": EMAQuantizer,
    "fsq": FSQQuantizer,
    "lfq": LFQQuantizer,
    "bsq": BSQQuantizer,
    "simvq": SimVQQuantizer,
    "ibq": IBQQuantizer,
}

__all__ = [
    "QUANTIZERS",
    "BSQQuantizer",
    "EMAQuantizer",
    "FSQQuantizer",
    "GumbelQuantizer",
    "IBQQuantizer",
    "LFQQuantizer",
    "Quantized",
    "Quantizer",
    "SimVQQuantizer",
    "Training",
    "VectorQuantizer",
    "straight_through",
]
