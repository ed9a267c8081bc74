"""Tests of the masked prior: its loss and metrics against plain computations in NumPy, and its
decoding against a plain loop over passes, images and codes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.priors import MaskedConfig
from taming_jax.config.schema import PriorConfig
from taming_jax.errors import UserError
from taming_jax.priors.masked import MaskedTransformer, choose_positions, hash_codes, rank_by_halton
from tests.priors.test_autoregressive import MODERN

K, GRID, LENGTH = 11, (3, 4), 12
LABELS = jnp.array([0, 1, 2, 3])  # the last means no class
KEYS = jax.random.split(jax.random.key(7), 4)
compiled = jax.jit(
    MaskedTransformer.sample, static_argnums=0,
    static_argnames=("top_k", "grid", "decoding_steps", "decoding_order"),
)  # fmt: skip


@functools.cache
def make_model(label_smoothing=0.1, **settings):
    sizes = {"layers": 1, "heads": 2, "width": 16, "dropout": 0.0}
    masked = MaskedConfig(label_smoothing=label_smoothing)
    config = PriorConfig(kind="masked", masked=masked, **sizes | settings)
    model = MaskedTransformer(K, 3, GRID, config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    return model, jax.tree.map(lambda p: 8 * p if p.ndim > 1 else p, params)


def make_codes(seed=1):
    return jax.random.randint(jax.random.key(seed), (4, LENGTH), 0, K)


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(model, params, labels, codes, is_masked):
    return model.logits(params, labels, codes, is_masked)


def compute_log_probs(model, params, labels, codes, is_masked):
    logits = np.asarray(compute_logits(model, params, labels, codes, is_masked), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_every_code_depends_on_the_class_and_on_all_visible_codes_only(settings):
    model, params = make_model(**settings)
    codes = make_codes()
    is_masked = jnp.zeros((4, LENGTH), bool).at[:, 5].set(True)
    logits = compute_logits(model, params, LABELS, codes, is_masked)
    for place in (0, 11):
        changed = codes.at[:, place].set((codes[:, place] + 1) % K)
        other = compute_logits(model, params, LABELS, changed, is_masked)
        assert (np.abs(other - logits).max((0, 2)) > 1e-4).all()
    hidden = codes.at[:, 5].set((codes[:, 5] + 1) % K)
    np.testing.assert_array_equal(compute_logits(model, params, LABELS, hidden, is_masked), logits)
    other = compute_logits(model, params, (LABELS + 1) % 4, codes, is_masked)
    assert (np.abs(other - logits).max(-1) > 1e-5).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_equals_a_plain_computation(label_smoothing):
    model, params = make_model(label_smoothing)
    codes = make_codes()
    loss = jax.jit(model.loss)(params, LABELS, codes, {"codes": KEYS, "dropout": KEYS}, 0.5)
    for i in range(4):
        share_key, mask_key = jax.random.split(KEYS[i])
        share = math.cos(math.pi / 2 * float(jax.random.uniform(share_key)))
        count = max(round(share * LENGTH), 1)
        # The masked positions have the smallest of random numbers.
        places = np.argsort(jax.random.uniform(mask_key, (LENGTH,)))[:count]
        is_masked = np.isin(np.arange(LENGTH), places)
        log_probs = compute_log_probs(
            model, params, LABELS[i : i + 1], codes[i : i + 1], is_masked[None]
        )[0]
        expected = sum(
            -(1 - label_smoothing) * log_probs[j, codes[i, j]]
            - label_smoothing * log_probs[j].mean()
            for j in places
        ) / (LENGTH * 2 / math.pi)
        assert loss[i] == pytest.approx(expected, rel=1e-5)


def test_the_divisor_of_the_loss_is_the_mean_number_of_masked_codes():
    u = (np.arange(10_000) + 0.5) / 10_000
    assert np.cos(np.pi / 2 * u).mean() == pytest.approx(2 / math.pi, rel=1e-6)


def test_validation_masks_a_uniform_number_of_codes_that_depends_on_the_codes_only():
    model, params = make_model()
    codes = make_codes()
    together = jax.jit(model.evaluate)(params, LABELS, codes)
    alone = jax.jit(model.evaluate)(params, LABELS[2:3], codes[2:3])
    assert alone["nll"][0] == pytest.approx(float(together["nll"][2]), rel=1e-5)
    for i in range(4):
        count_key, mask_key = jax.random.split(jax.random.key(hash_codes(codes[i])))
        count = jax.random.randint(count_key, (), 1, LENGTH + 1)
        is_masked = np.asarray(choose_positions(mask_key, LENGTH, count))
        assert is_masked.sum() == count
        log_probs = compute_log_probs(
            model, params, LABELS[i : i + 1], codes[i : i + 1], is_masked[None]
        )[0]
        nll = -log_probs[np.arange(LENGTH), codes[i]][is_masked].mean()
        correct = (log_probs.argmax(-1) == codes[i])[is_masked].mean()
        assert together["nll"][i] == pytest.approx(nll, rel=1e-5)
        assert together["accuracy"][i] == pytest.approx(correct)
    many = jax.random.randint(jax.random.key(2), (6000, LENGTH), 0, K)
    hashes = jax.vmap(hash_codes)(many)
    assert len(np.unique(hashes)) > 5990
    counts = jax.vmap(
        lambda x: jax.random.randint(jax.random.split(jax.random.key(x))[0], (), 1, LENGTH + 1)
    )(hashes)
    frequencies = np.bincount(counts, minlength=LENGTH + 1)[1:] / 6000
    assert np.abs(frequencies - 1 / LENGTH).max() < 4 * math.sqrt(1 / LENGTH / 6000)


def decode_plainly(model, params, known, steps, order, scales, temperature, choice_temperature):
    """Draws the codes [b,t] image by image, and returns them and the passes that drew them.
    `scales` are those of the passes, or None."""
    labels, images, passes = np.asarray(LABELS), [], np.full((4, LENGTH), -1)
    for i, key in enumerate(KEYS):
        codes = np.array(known[i])
        unknown = (codes < 0).sum()
        start = int(jax.random.randint(jax.random.fold_in(key, 2 * steps), (), 0, LENGTH))
        for step in range(steps):
            is_masked = codes < 0
            args = jnp.asarray(codes)[None], jnp.asarray(is_masked)[None]
            logits = np.asarray(compute_logits(model, params, labels[i : i + 1], *args))[0]
            if scales is not None:
                free = np.asarray(compute_logits(model, params, np.array([3]), *args))[0]
                logits = free + scales[step] * (logits - free)
            if temperature == 0:
                drawn = logits.argmax(-1)
            else:
                drawn = np.asarray(
                    jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)
                )
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            noise_key = jax.random.fold_in(key, steps + step)
            noise = np.asarray(jax.random.gumbel(noise_key, (LENGTH,)))
            noise = noise * choice_temperature * (1 - (step + 1) / steps)
            if order == "halton":
                confidence = -((rank_by_halton(GRID) - start) % LENGTH)
            else:
                confidence = log_probs[np.arange(LENGTH), drawn] + noise
            still_masked = math.floor(math.cos(math.pi / 2 * (step + 1) / steps) * unknown + 1e-6)
            still_masked = max(min(still_masked, is_masked.sum() - 1), 0)
            places = sorted(np.flatnonzero(is_masked), key=lambda j: confidence[j])
            for j in places[still_masked:]:
                codes[j], passes[i, j] = drawn[j], step
        images.append(codes)
    return np.stack(images), passes


@pytest.mark.parametrize(
    ("steps", "order", "scale", "temperature", "choice_temperature"),
    [
        (1, "confidence", None, 1.0, 4.5), (5, "confidence", None, 0.0, 0.0),
        (5, "confidence", None, 1.0, 4.5), (5, "halton", None, 1.0, 4.5),
        (4, "confidence", (0.5, 3.0), 0.7, 1.0), (30, "confidence", None, 1.0, 4.5),
    ],
)  # fmt: skip
def test_decoding_equals_a_plain_loop(steps, order, scale, temperature, choice_temperature):
    model, params = make_model()
    # The images have no, one, six, and eleven known codes.
    known = np.where(np.arange(LENGTH) < np.array([0, 1, 6, 11])[:, None], make_codes(3), -1)
    known = np.random.default_rng(0).permuted(known, axis=1)
    positions = scales = None
    if scale is not None:
        positions = jnp.linspace(*scale, LENGTH)
        known_shares = 1 - np.cos(np.pi / 2 * np.arange(steps) / steps)
        scales = np.asarray(positions)[(known_shares * LENGTH).astype(int)]
    codes, passes = compiled(
        model, params, LABELS, KEYS, known=known, temperature=temperature,
        guidance_scale=positions, decoding_steps=steps, decoding_order=order,
        choice_temperature=choice_temperature,
    )  # fmt: skip
    assert codes.shape == (4, *GRID) and codes.dtype == jnp.int32
    expected, expected_passes = decode_plainly(
        model, params, known, steps, order, scales, temperature, choice_temperature
    )
    np.testing.assert_array_equal(codes.reshape(4, LENGTH), expected)
    np.testing.assert_array_equal(passes.reshape(4, LENGTH), expected_passes)
    assert (expected >= 0).all() and (expected[known >= 0] == known[known >= 0]).all()


def test_an_image_does_not_depend_on_the_others():
    model, params = make_model()
    together = compiled(model, params, LABELS, KEYS, top_p=0.9, top_k=8, guidance_scale=1.5)
    alone = compiled(model, params, LABELS[2:3], KEYS[2:3], top_p=0.9, top_k=8, guidance_scale=1.5)
    np.testing.assert_array_equal(alone.codes, together.codes[2:3])


def test_the_halton_order_visits_every_cell_once_and_spreads():
    places = rank_by_halton((8, 8))
    assert sorted(places) == list(range(64))
    rows, columns = np.divmod(np.argsort(places), 8)
    # The sequence in bases 2 and 3 starts at (1/2, 1/3), (1/4, 2/3), (3/4, 1/9).
    assert list(zip(rows[:3], columns[:3], strict=True)) == [(4, 2), (2, 5), (6, 0)]
    first = np.zeros((8, 8))
    first[rows[:16], columns[:16]] = 1
    quarters = first.reshape(2, 4, 2, 4).sum((1, 3))
    assert quarters.min() >= 3 and quarters.max() <= 5


def test_what_a_masked_prior_cannot_do_is_refused():
    model, _ = make_model()
    with pytest.raises(UserError, match="a masked prior has no likelihood"):
        model.check_likelihood(GRID)
    with pytest.raises(UserError, match="draws only images of the training size"):
        model.check_drawing((6, 8), None)
    model.check_drawing(GRID, None)
