"""Training. The package can be called: `taming_jax.train(config, "vqgan")` trains a stage from a
notebook as the two scripts do from the command line."""

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path

from taming_jax.config import Config


class _CallablePackage(types.ModuleType):
    def __call__(
        self, config: Config | str, stage: str = "vqgan", *, restart: bool = False
    ) -> Path:
        """Trains a stage ("vqgan" or "prior") of a config, or of a preset by its name, to its last
        step, resuming what its folder holds, and answers that folder.

        Raises UserError and RunFailed as the scripts do; after an interruption, and saving,
        Interrupted, which is a KeyboardInterrupt.
        """
        from taming_jax.config import load_config
        from taming_jax.errors import UserError
        from taming_jax.train.devices import Devices
        from taming_jax.train.loop import Stage, train
        from taming_jax.train.prior import PriorStage
        from taming_jax.train.vqgan import build_stage

        stages: dict[str, Callable[[Config, Devices], Stage]] = {
            "vqgan": functools.partial(build_stage, restart=restart),
            "prior": functools.partial(PriorStage, restart=restart),
        }
        if stage not in stages:
            raise UserError(f"there is no stage '{stage}'; the stages are {', '.join(stages)}.")
        config = load_config(config) if isinstance(config, str) else config
        return train(stages[stage], config, restart)


sys.modules[__name__].__class__ = _CallablePackage
