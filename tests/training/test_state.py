import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taming_jax.config.load import load_config
from taming_jax.training.state import (
    Net,
    TrainState,
    add_clipping,
    apply_if_finite,
    build_schedule,
    ema_update,
)

SETTINGS = load_config("mnist").vqgan


def test_the_learning_rate_warms_up_and_decays_over_the_run():
    settings = dataclasses.replace(SETTINGS, warmup_steps=10, final_learning_rate=0.2)
    rates = [float(build_schedule(settings, 100, 3.0)(step)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 3.0 * np.arange(1, 11) / 10, rtol=1e-5)
    progress = np.arange(1, 91) / 90
    cosine = 0.2 + 0.8 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(rates[10:], 3.0 * cosine, rtol=1e-4)
    short = [float(build_schedule(settings, 4, 3.0)(step)) for step in range(4)]
    np.testing.assert_allclose(short, rates[:4], rtol=1e-6)  # four steps are all warm-up
    assert {float(build_schedule(SETTINGS, 100, 3.0)(step)) for step in (0, 50, 99)} == {3.0}


def test_an_update_is_that_of_adam_at_the_given_rate():
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    gradients = [{"w": jnp.array(g)} for g in ([0.5, 0.1, -1.0], [0.2, -0.3, 0.4])]
    optimizer = add_clipping(optax.scale_by_adam(0.5, 0.9), None)
    adam = optax.adam(0.1, 0.5, 0.9)
    net, expected, state = Net(params, optimizer.init(params)), params, adam.init(params)
    for gradient in gradients:
        net = net.apply_gradients(optimizer, gradient, jnp.float32(0.1))
        updates, state = adam.update(gradient, state)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(net.params["w"], expected["w"], rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    sgd = add_clipping(optax.identity(), 1.0)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    net = Net(params, sgd.init(params)).apply_gradients(sgd, gradients, jnp.float32(1.0))
    np.testing.assert_allclose(net.params["a"], [-0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(net.params["b"], [-0.8], rtol=1e-6)


def test_a_moving_average_starts_with_a_small_decay():
    assert ema_update(0.0, 1.0, 0.99, jnp.int32(0)) == pytest.approx(0.9)
    assert ema_update(0.0, 1.0, 0.99, jnp.int32(10**6)) == pytest.approx(0.01, rel=1e-3)
    net = Net({"w": jnp.ones(2)}, (), ema={"w": jnp.zeros(2)}).update_ema(0.5, jnp.int32(10**6))
    np.testing.assert_allclose(net.eval_params["w"], 0.5)
    assert (net.replace(ema=None).eval_params["w"] == 1).all()


def test_a_non_finite_step_changes_only_the_counts():
    def make_net(value):
        values = jnp.full(3, value)
        return Net({"w": values}, (jnp.int32(value),), {"stats": values}, {"w": values})

    before = TrainState(jnp.int32(7), {"generator": make_net(1.0)}, jnp.int32(2))
    for metrics, skipped in (
        ({"loss": 1.0, "norm": 2.0}, 0),
        ({"loss": 1.0, "norm": jnp.inf}, 1),
        ({"loss": jnp.nan, "norm": 2.0}, 1),
    ):
        arrays = {key: jnp.float32(value) for key, value in metrics.items()}
        step = jax.jit(functools.partial(apply_if_finite, must_be_finite=tuple(arrays)))
        after, packed = step(before, {"generator": make_net(5.0)}, arrays)
        (new_metrics,) = packed.unpack()
        assert (after.step, after.skipped, new_metrics["skipped"]) == (8, 2 + skipped, 2 + skipped)
        assert after.skipped.dtype == jnp.int32 and packed.values.dtype == jnp.float32
        assert new_metrics.keys() == {"loss", "norm", "skipped"}
        for leaf in jax.tree.leaves(after.nets):
            assert (leaf == (1 if skipped else 5)).all()


def test_a_non_finite_metric_that_is_not_a_loss_does_not_skip_a_step():
    before = TrainState(jnp.int32(7), {"generator": Net({"w": jnp.ones(3)}, ())}, jnp.int32(2))
    after = {"generator": Net({"w": jnp.zeros(3)}, ())}
    metrics = {
        "loss": jnp.float32(1),
        "gradient": jnp.float32(2),
        "perplexity": jnp.float32(jnp.nan),
    }
    state, packed = apply_if_finite(before, after, metrics, ("loss", "gradient"))
    (new_metrics,) = packed.unpack()
    assert (state.skipped, new_metrics["skipped"]) == (2, 2)
    assert (state.nets["generator"].params["w"] == 0).all() and jnp.isnan(new_metrics["perplexity"])
