"""When a run validates, saves, logs, and draws its figures."""

import math
from dataclasses import dataclass

from taming_jax.config.schema import StageConfig


def space_evenly(times: int, epoch: int, steps: int) -> int:
    """Returns the default number of steps between validations, checkpoints, or figures, of which a
    run of `steps` steps should have at most `times`: at least an epoch, and at least 100 steps, so
    that a device does not wait for them most of the time if epochs are short."""
    return max(math.ceil(steps / times), epoch, 100)


@dataclass(frozen=True)
class Cadences:
    """The numbers of steps between validations, validations with a Fréchet distance (None: never),
    checkpoints, rows of the log, and figures."""

    validate: int
    distance: int | None
    save: int
    log: int
    draw: int

    @property
    def periods(self) -> list[int]:
        """The cadences that end a call of several steps. Figures follow validations."""
        return [n for n in (self.validate, self.distance, self.save, self.log) if n]

    @classmethod
    def choose(cls, settings: StageConfig, examples: int) -> "Cadences":
        """Returns the cadences that are set, and defaults for the others, which follow from the
        length of the run and of an epoch with this many training examples."""
        steps, epoch = settings.total_steps(examples), math.ceil(examples / settings.batch_size)
        # No call of several steps crosses a row of the log, so its default is a multiple of them.
        dispatch = getattr(settings, "steps_per_dispatch", 1)
        log = math.ceil(max(steps // 1000, 1) / dispatch) * dispatch
        return cls(
            settings.eval_every or space_evenly(50, epoch, steps),
            settings.fd_every,
            settings.checkpoint_every or space_evenly(20, epoch, steps),
            settings.log_every or log,
            settings.draw_every or space_evenly(10, epoch, steps),
        )
