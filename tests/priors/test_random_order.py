"""Tests of the random-order prior: its orders, its loss, and sampling in any order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.priors import RandomOrderConfig
from taming_jax.config.schema import PriorConfig
from taming_jax.errors import UserError
from taming_jax.losses import next_token
from taming_jax.priors.random_order import RandomOrderGPT
from tests import golden
from tests.priors.test_autoregressive import MODERN

K, GRID, LENGTH = 11, (3, 4), 12
LABELS = jnp.array([0, 1, 2, 3])  # the last means no class
KEYS = jax.random.split(jax.random.key(7), 4)
compiled = jax.jit(
    RandomOrderGPT.sample, static_argnums=0, static_argnames=("top_k", "grid", "pieces")
)


@functools.cache
def make_model(final_share=0.2, **settings):
    sizes = {"layers": 2, "heads": 2, "width": 16, "dropout": 0.0}
    own = RandomOrderConfig(final_share=final_share)
    config = PriorConfig(kind="random-order", random_order=own, **sizes | settings)
    model = RandomOrderGPT(K, 3, GRID, config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    return model, jax.tree.map(lambda p: 8 * p if p.ndim > 1 else p, params)


def make_codes(seed=1):
    return jax.random.randint(jax.random.key(seed), (4, LENGTH), 0, K)


def make_orders():
    return jnp.stack([jax.random.permutation(key, LENGTH) for key in KEYS])


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(model, params, labels, codes, order):
    """Returns the logits [b,t,k] of the codes at their places, predicted in an order."""
    tokens = model.shift_right(labels, jnp.take_along_axis(codes, order, 1))
    logits = model.apply({"params": params}, tokens, None, order)
    return jnp.take_along_axis(logits, jnp.argsort(order, 1)[..., None], 1)


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_code_depends_on_the_class_and_on_the_earlier_codes_in_the_order(settings):
    model, params = make_model(**settings)
    codes, order = make_codes(), make_orders()
    logits = compute_logits(model, params, LABELS, codes, order)
    positions = np.argsort(order, 1)  # of each place
    for place in range(LENGTH):
        changed = codes.at[:, place].set((codes[:, place] + 1) % K)
        other = compute_logits(model, params, LABELS, changed, order)
        change = np.abs(other - logits).max(-1)
        is_later = positions > positions[:, place : place + 1]
        assert (change[is_later] > 1e-4).all() and (change[~is_later] < 1e-6).all()
    other = compute_logits(model, params, (LABELS + 1) % 4, codes, order)
    assert (np.abs(other - logits).max(-1) > 1e-4).all()


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_the_order_changes_predictions_only_through_what_is_known(settings):
    """Two orders that differ only in their last codes predict the first ones alike, and each
    prediction depends on its own place."""
    model, params = make_model(**settings)
    codes, order = make_codes(), make_orders()
    swapped = order.at[:, 10:].set(order[:, 11:9:-1])
    one, other = (compute_logits(model, params, LABELS, codes, x) for x in (order, swapped))
    first = np.argsort(order, 1) < 10
    np.testing.assert_allclose(one[first], other[first], atol=1e-5)
    # The first prediction sees only the class; at another place, it differs.
    rotated = jnp.roll(order, 1, 1)
    rotated_logits = compute_logits(model, params, LABELS, codes, rotated)
    for i in range(4):
        a, b = one[i, order[i, 0]], rotated_logits[i, rotated[i, 0]]
        assert np.abs(a - b).max() > 1e-4


def test_the_share_of_random_orders_falls_linearly():
    model, _ = make_model(final_share=0.2)
    shares = [float(model.compute_share(x)) for x in (0, 0.5, 0.6, 0.75, 1.0)]
    assert shares == pytest.approx([1, 1, 0.2 + 0.8 * 0.6, 0.2, 0.2])
    sudden = make_model()[0].clone(
        settings=PriorConfig(random_order=RandomOrderConfig(anneal_start=0.5, anneal_end=0.5))
    )
    assert [float(sudden.compute_share(x)) for x in (0.499, 0.501)] == [1, 0]


def test_the_loss_is_that_of_random_orders_first_and_of_the_raster_order_at_the_end():
    model, params = make_model(final_share=0.0)
    codes, keys = make_codes(), {"codes": KEYS, "dropout": KEYS}
    loss = jax.jit(model.loss)
    raster = next_token(jax.jit(model.logits)(params, LABELS, codes), codes)
    np.testing.assert_allclose(loss(params, LABELS, codes, keys, 0.8), raster, rtol=1e-5)
    seeds = [jax.random.split(jax.random.fold_in(key, 2))[1] for key in KEYS]
    order = jnp.stack([jax.random.permutation(seed, LENGTH) for seed in seeds])
    logits = compute_logits(model, params, LABELS, codes, order)
    expected = next_token(logits, codes)
    np.testing.assert_allclose(loss(params, LABELS, codes, keys, 0.3), expected, rtol=1e-5)
    assert (np.abs(expected - raster) > 1e-3).all()
    # Half of the examples are in random order in the middle of the annealing.
    many = jax.random.split(jax.random.key(5), 2000)
    repeated = jnp.tile(codes[:1], (2000, 1))
    losses = loss(
        params, LABELS[:1].repeat(2000), repeated, {"codes": many, "dropout": many}, 0.625
    )
    assert (np.abs(losses - raster[0]) < 1e-4).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_completion_reads_all_known_codes_first(settings):
    """Greedy codes with the cache, after known codes at any places and with guidance, are the most
    likely codes of a pass over the whole sequence in the same order."""
    model, params = make_model(**settings)
    is_known = np.random.default_rng(0).random((4, LENGTH)) < 0.5
    known = jnp.where(is_known, make_codes(3), -1)
    scales = jnp.linspace(0.5, 3, LENGTH)
    codes = compiled(
        model, params, LABELS, KEYS, temperature=0.0, known=known, guidance_scale=scales, pieces=3
    ).codes.reshape(4, LENGTH)
    order = jnp.argsort(~is_known, 1, stable=True)
    logits, free = (
        compute_logits(model, params, labels, codes, order)
        for labels in (LABELS, jnp.full(4, model.classes))
    )
    scale = scales[jnp.argsort(order, 1)][..., None]
    expected = jnp.where(is_known, known, (free + scale * (logits - free)).argmax(-1))
    np.testing.assert_array_equal(codes, expected)


def test_samples_follow_the_raster_order_and_do_not_depend_on_each_other():
    model, params = make_model()
    codes = compiled(model, params, LABELS, KEYS, temperature=0.0).codes.reshape(4, LENGTH)
    logits = jax.jit(model.logits)(params, LABELS, codes)
    np.testing.assert_array_equal(codes, logits.argmax(-1))
    together = compiled(model, params, LABELS, KEYS, top_k=8, guidance_scale=1.5)
    alone = compiled(model, params, LABELS[2:3], KEYS[2:3], top_k=8, guidance_scale=1.5)
    np.testing.assert_array_equal(alone.codes, together.codes[2:3])


def test_the_log_likelihood_is_that_of_the_raster_order():
    model, params = make_model()
    codes = make_codes()
    order = jnp.tile(jnp.arange(LENGTH), (4, 1))
    expected = -LENGTH * next_token(compute_logits(model, params, LABELS, codes, order), codes)
    result = jax.jit(model.log_likelihood)(params, LABELS, codes.reshape(4, *GRID))
    golden.assert_close(result, expected, "log-likelihood", 1e-5)


def test_kept_codes_after_drawn_ones_need_a_share_of_random_orders():
    prefix = np.array([[1, 2, -1, -1], [-1, -1, -1, -1]])
    hole = np.array([[1, -1, -1, 2]])
    with_share, without = make_model()[0], make_model(final_share=0.0)[0]
    for model in (with_share, without):
        model.check_drawing((6, 8), prefix)
    with pytest.raises(UserError, match=r"--prior.random-order.final-share above 0"):
        without.check_drawing(GRID, hole)
    with_share.check_drawing(GRID, hole)
    with pytest.raises(UserError, match="works only for images of the training size"):
        with_share.check_drawing((6, 8), hole)
    with pytest.raises(UserError, match="anneal-start 0.8 is after"):
        RandomOrderConfig(anneal_start=0.8).check()
