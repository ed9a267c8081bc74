"""What a training step changes: a step number and, by name, its networks."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from taming_jax.config.schema import StageConfig

# What randomness in a run is for; each purpose folds its own number into the run's seed.
DROPOUT, LABELS, CODES, AUGMENTATION, REAL, FAKE = range(6)


def example_keys(seed: int, purpose: int, step: Any, place: jax.Array) -> jax.Array:
    """A key an example [b], of its place in the batch of all devices."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(place)


class Net(struct.PyTreeNode):
    """One network. `extra` holds what is neither parameter nor optimiser (BatchNorm's running
    statistics, LeCAM's averages); `ema` is the moving average of the parameters, or None."""

    params: Any
    opt_state: Any
    extra: Any = struct.field(default_factory=dict)
    ema: Any = None

    def with_update(
        self, optimiser: optax.GradientTransformation, gradients: Any, rate: jax.Array
    ) -> "Net":
        """The network after one step of its optimiser, at a learning rate."""
        updates, opt_state = optimiser.update(gradients, self.opt_state, self.params)
        params = jax.tree.map(lambda p, u: p - rate * u, self.params, updates)
        return self.replace(params=params, opt_state=opt_state)

    def with_ema(self, decay: float, step: jax.Array) -> "Net":
        """The moving average moved on by one step."""
        return self.replace(ema=ema_update(self.ema, self.params, decay, step))

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate with: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


class TrainState(struct.PyTreeNode):
    """`step` int32 [] counts the steps taken, `skipped` int32 [] those among them that changed
    nothing, since something in them was not finite."""

    step: jax.Array
    nets: dict[str, Net]
    skipped: jax.Array = struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))


def apply_if_finite(
    state: TrainState, nets: dict[str, Net], metrics: dict[str, jax.Array], deciding: Sequence[str]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after a step that computed `metrics` and the updated networks `nets`, and the
    metrics with the number of steps skipped so far.

    A step is skipped, leaving all networks as they were, where one of the metrics named by
    `deciding` is not finite: losses and norms of gradients. Other metrics only describe the step.
    """
    finite = jnp.isfinite(jnp.stack([metrics[name] for name in deciding])).all()
    nets = jax.tree.map(lambda new, old: jnp.where(finite, new, old), nets, state.nets)
    skipped = state.skipped + jnp.where(finite, 0, 1)
    after = TrainState(state.step + 1, nets, skipped)
    return after, metrics | {"skipped": skipped.astype(jnp.float32)}


def ema_update(average: Any, value: Any, decay: float, n: jax.Array) -> Any:
    """A moving average after its update number `n`, from 0. Early on it follows faster,
    (1 + n) / (10 + n), so that it soon forgets where it began."""
    n = n.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda a, v: keep * a + (1 - keep) * v, average, value)


@jax.jit
def copy_buffers(tree: Any) -> Any:
    """A tree in buffers of its own: a buffer that is in a donated state twice crashes JAX."""
    return jax.tree.map(jnp.copy, tree)


def schedule(settings: StageConfig, steps: int, rate: float) -> optax.Schedule:
    """The learning rate of a run's step, counted from 0: warm-up from zero and cosine decay. It is
    a function of the run's step, not of an optimiser's own count, so that an optimiser that starts
    late, or a run that is made longer, follows the run's schedule."""
    warmup = settings.warmup_steps
    if not warmup and settings.final_learning_rate == 1:
        return optax.constant_schedule(rate)
    whole = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else rate,
        peak_value=rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=rate * settings.final_learning_rate,
    )
    # The first step is 1 of `steps`, so that its learning rate is not zero.
    return lambda step: whole(step + 1)


def with_clipping(optimiser: optax.GradientTransformation, clip: float | None) -> Any:
    """The optimiser behind a bound on the gradients' global norm, where there is one."""
    return optimiser if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimiser)
