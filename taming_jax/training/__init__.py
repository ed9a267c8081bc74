"""Training of both stages."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taming_jax.config.schema import Config


def train(config: "Config | str", stage: str = "vqgan", *, restart: bool = False) -> Path:
    """Trains a stage ("vqgan" or "prior") of a config, or of a preset by its name, to its last
    step, and returns the run's folder. A run that the folder holds is resumed, unless `restart`.

    Raises UserError for what the user can fix and RunFailed where the run cannot go on; after
    SIGINT or SIGTERM, and saving, Interrupted, which is a KeyboardInterrupt.
    """
    from taming_jax.config.load import load_config
    from taming_jax.errors import UserError
    from taming_jax.training import loop
    from taming_jax.training.prior import PriorStage
    from taming_jax.training.stage import Stage
    from taming_jax.training.vqgan import VQGANStage

    stages: dict[str, type[Stage]] = {"vqgan": VQGANStage, "prior": PriorStage}
    if stage not in stages:
        raise UserError(f"there is no stage '{stage}'; the stages are {', '.join(stages)}.")
    config = load_config(config) if isinstance(config, str) else config
    return loop.train(stages[stage], config, restart)
