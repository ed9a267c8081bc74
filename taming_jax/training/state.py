"""The training state, and the random keys and schedules that both stages use."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from taming_jax.config.schema import StageConfig

# The purposes of random keys. Each purpose's number is folded into the run's seed.
DROPOUT, LABELS, CODES, AUGMENTATION, REAL, FAKE, RESTARTS = range(7)


def make_step_key(seed: int, purpose: int, step: Any) -> jax.Array:
    """Returns the random key of a step for a purpose."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def make_example_keys(seed: int, purpose: int, step: Any, place: jax.Array) -> jax.Array:
    """Returns one key per example [b], derived from its position in the global batch, `place`
    int32 [b], so that keys do not depend on the number of devices."""
    key = make_step_key(seed, purpose, step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(place)


class Net(struct.PyTreeNode):
    """The state of one network. `extra` holds state that is neither a parameter nor an optimizer
    state: BatchNorm's running statistics, LeCam's averages, and a quantizer's counts. `ema` is the
    exponential moving average of the parameters, or None."""

    params: Any
    opt_state: Any
    extra: Any = struct.field(default_factory=dict)
    ema: Any = None

    def apply_gradients(
        self, optimizer: optax.GradientTransformation, gradients: Any, rate: jax.Array
    ) -> "Net":
        """Returns the network after one optimizer step at the learning rate `rate`."""
        updates, opt_state = optimizer.update(gradients, self.opt_state, self.params)
        params = jax.tree.map(lambda p, u: p - rate * u, self.params, updates)
        return self.replace(params=params, opt_state=opt_state)

    def update_ema(self, decay: float, step: jax.Array) -> "Net":
        """Returns the network with its EMA updated for a step, counted from 0."""
        return self.replace(ema=ema_update(self.ema, self.params, decay, step))

    @property
    def eval_params(self) -> Any:
        """The parameters for evaluation: the EMA if there is one, else the parameters."""
        return self.params if self.ema is None else self.ema


class TrainState(struct.PyTreeNode):
    """The training state. `step` int32 [] counts all steps, and `skipped` int32 [] counts the steps
    that changed no network because a loss or a gradient was not finite."""

    step: jax.Array
    nets: dict[str, Net]
    skipped: jax.Array = struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))


class Metrics(struct.PyTreeNode):
    """The metrics of a step: `values` float32 [m] in the order of `names`. They are one array,
    because each array that a step returns takes time, however small it is."""

    values: jax.Array | np.ndarray
    names: tuple[str, ...] = struct.field(pytree_node=False)

    @classmethod
    def pack(cls, metrics: Mapping[str, jax.Array]) -> "Metrics":
        """Packs scalars, sorted by name."""
        names = sorted(metrics)
        values = [jnp.asarray(metrics[name], jnp.float32) for name in names]
        return cls(jnp.stack(values), tuple(names))

    def unpack(self) -> list[dict[str, Any]]:
        """Returns a dictionary per step, for `values` [m] or [n,m]."""
        rows = np.reshape(self.values, (-1, len(self.names)))
        return [dict(zip(self.names, row, strict=True)) for row in rows]


def apply_if_finite(
    state: TrainState,
    nets: dict[str, Net],
    metrics: dict[str, jax.Array],
    must_be_finite: Sequence[str],
) -> tuple[TrainState, Metrics]:
    """Returns the state after a step, and its metrics with the number of skipped steps so far.

    `nets` are the updated networks. If any of the metrics named in `must_be_finite` (losses and
    gradient norms) is not finite, the step is skipped: it leaves all networks unchanged. Other
    metrics may be non-finite.
    """
    finite = jnp.isfinite(jnp.stack([metrics[name] for name in must_be_finite])).all()
    nets = jax.tree.map(lambda new, old: jnp.where(finite, new, old), nets, state.nets)
    skipped = state.skipped + jnp.where(finite, 0, 1)
    new_state = TrainState(state.step + 1, nets, skipped)
    return new_state, Metrics.pack(metrics | {"skipped": skipped})


def ema_update(average: Any, value: Any, decay: float, n: jax.Array) -> Any:
    """Returns an exponential moving average after update number `n`, counted from 0. The decay of
    early updates is (1 + n) / (10 + n) if that is smaller, so that the average soon forgets its
    initial value."""
    n = n.astype(jnp.float32)
    effective_decay = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(
        lambda a, v: effective_decay * a + (1 - effective_decay) * v, average, value
    )


def build_schedule(settings: StageConfig, steps: int, rate: float) -> optax.Schedule:
    """Returns the learning rate as a function of the run's step, counted from 0: linear warm-up
    from zero to `rate`, then cosine decay. It depends on the run's step, not on the optimizer's own
    count, so that an optimizer that starts late, or a run that is extended, follows the run's
    schedule."""
    warmup = settings.warmup_steps
    if not warmup and settings.final_learning_rate == 1:
        return optax.constant_schedule(rate)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else rate,
        peak_value=rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=rate * settings.final_learning_rate,
    )
    # Count from 1, so that the learning rate of the first step is not zero.
    return lambda step: schedule(step + 1)


def add_clipping(optimizer: optax.GradientTransformation, clip: float | None) -> Any:
    """Returns the optimizer with gradients clipped to the global norm `clip`, if it is not None."""
    return optimizer if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimizer)
