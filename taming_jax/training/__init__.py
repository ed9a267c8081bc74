"""Training of both stages: the VQ-GAN and the prior."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taming_jax.config.schema import Config
    from taming_jax.training.stage import Stage


def get_stages() -> "dict[str, type[Stage]]":
    """Returns the stages by name, in the order in which they are trained."""
    from taming_jax.training.prior import PriorStage
    from taming_jax.training.vqgan import VQGANStage

    return {"vqgan": VQGANStage, "prior": PriorStage}


def train(config: "Config | str", stage: str = "vqgan", *, restart: bool = False) -> Path:
    """Trains one stage ("vqgan" or "prior") to its last step and returns the run's folder.

    `config` is a config or the name of a preset. If the folder already holds a run, training
    resumes from its newest checkpoint; with `restart`, it starts over.

    Raises UserError for problems that you can fix, and RunFailed if the run cannot continue. After
    SIGINT or SIGTERM, saves a checkpoint and raises Interrupted, a subclass of KeyboardInterrupt.
    """
    from taming_jax.config.load import load_config
    from taming_jax.errors import UserError
    from taming_jax.training import loop

    stages = get_stages()
    if stage not in stages:
        raise UserError(f"there is no stage '{stage}'; choose one of {', '.join(stages)}.")
    config = load_config(config) if isinstance(config, str) else config
    return loop.train(stages[stage], config, restart)
