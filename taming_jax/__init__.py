"""VQ-GAN and transformer prior ("Taming Transformers", arXiv 2012.09841) in JAX.

    import taming_jax
    config = taming_jax.load_config("mnist_tiny")
    taming_jax.train(config, "vqgan")
    run = taming_jax.load_run(taming_jax.train(config, "prior"))

Names are imported lazily, on first use, so that importing the package is fast.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "Config": "config.schema",
    "load_config": "config.load",
    "train": "training",
    "UserError": "errors",
    "RunFailed": "errors",
    "Run": "run",
    "load_run": "run",
    "save_pretrained": "sharing",
    "push": "sharing",
    "pull": "sharing",
    "evaluate": "evaluation.report",
    "VQGAN": "models.vqgan",
    "build_vqgan": "models.vqgan",
    "Encoder": "models.autoencoder",
    "Decoder": "models.autoencoder",
    "VectorQuantizer": "models.quantizers",
    "GPT": "priors.autoregressive",
    "build_prior": "priors.registry",
    "Discriminator": "models.discriminator",
    "lpips": "models.lpips",
    "load_lpips": "models.lpips",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"taming_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'taming_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
