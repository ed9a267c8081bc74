import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taming_jax.cli.report.trace import count_copies_in_loops
from taming_jax.losses import next_token
from taming_jax.priors import autoregressive, windows
from taming_jax.priors.autoregressive import GPT
from taming_jax.priors.decoding import (
    exclude_unlikely,
    guide_logits,
    make_token_sampler,
    sampling_batch_size,
    sampling_pieces,
)
from tests import golden
from tests.priors.test_autoregressive import MODERN, make_small_model

compiled = jax.jit(GPT.sample, static_argnums=0, static_argnames=("top_k", "grid", "pieces"))


def sample(model, params, labels, keys, pieces=2, **settings):
    """Samples codes [b,t]; by default in two pieces, with one boundary between them. Checks that
    all codes but the known ones are drawn in raster order."""
    codes, passes = compiled(model, params, labels, keys, pieces=pieces, **settings)
    order = np.tile(np.arange(codes[0].size), (len(codes), 1))
    known = settings.get("known")
    if known is not None:
        order[:, : known.shape[1]][np.asarray(known) >= 0] = -1
    np.testing.assert_array_equal(passes, order.reshape(codes.shape))
    return codes.reshape(len(codes), -1)


@functools.partial(jax.jit, static_argnums=0)
def compute_uncached_logits(model, params, labels, codes, scale=None):
    """Returns the logits [b,t,k] from one forward pass over the whole grid, with guidance."""
    logits = model.logits(params, labels, codes)
    if scale is None:
        return logits
    null_labels = jnp.full_like(labels, model.classes)
    unconditional = model.logits(params, null_labels, codes)
    return guide_logits(logits, unconditional, scale)


LABELS = jnp.array([0, 1, 2, 2])
KEYS = jax.random.split(jax.random.key(7), 4)


@pytest.mark.parametrize(
    ("settings", "scale", "pieces"),
    [
        pytest.param({}, None, 1, marks=pytest.mark.slow), ({}, 2.0, 5),
        pytest.param({}, 2.0, 12, marks=pytest.mark.slow),
        (MODERN, 2.0, 5),
    ],
    ids=["one piece", "guided", "one piece per position", "modern"],
)  # fmt: skip
def test_greedy_codes_are_the_most_likely_codes_of_a_full_forward_pass(settings, scale, pieces):
    model, params, _ = make_small_model(**settings)
    codes = sample(
        model, params, LABELS, KEYS, temperature=0.0, guidance_scale=scale, pieces=pieces
    )
    logits = compute_uncached_logits(model, params, LABELS, codes, scale)
    np.testing.assert_array_equal(codes, logits.argmax(-1))


@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_logits_with_the_cache_equal_those_of_the_whole_sequence(settings, scale):
    """Compares the logits at every position, after a prefix that the model did not choose."""
    model, params, _ = make_small_model(**settings)
    codes = jax.random.randint(jax.random.key(4), (4, 12), 0, 11)
    expected = compute_uncached_logits(model, params, LABELS, codes, scale)
    tokens, cache = model.shift_right(LABELS, codes), model.init_cache(4, 12)
    if scale is not None:
        null_tokens = model.shift_right(jnp.full_like(LABELS, model.classes), codes)
        tokens, cache = jnp.concatenate([tokens, null_tokens]), model.init_cache(8, 12)
    step = jax.jit(autoregressive.compute_next_logits, static_argnums=0)
    for position in range(12):
        logits, cache = step(model, params, tokens[:, position], cache, position, scale)
        golden.assert_close(logits, expected[:, position], f"position {position}", 1e-4, 1e-6)


def test_a_prefix_is_kept_and_continued_as_if_it_had_been_sampled():
    model, params, _ = make_small_model()
    draw = functools.partial(sample, model, params, LABELS, KEYS)
    original = sample(model, params, LABELS, KEYS)
    np.testing.assert_array_equal(draw(known=original[:, :5]), original)
    other = draw(known=(original[:, :5] + 1) % 11)
    np.testing.assert_array_equal(other[:, :5], (original[:, :5] + 1) % 11)
    assert (other[:, 5:] != original[:, 5:]).any()


@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.slow), MODERN], ids=["gpt2", "modern"]
)
def test_greedy_codes_after_a_prefix_follow_a_guidance_schedule(settings):
    """Compares a prefix, a guidance schedule, and a growing cache with the whole sequence."""
    model, params, _ = make_small_model(**settings)
    scales = jnp.linspace(0.0, 4.0, 12)
    prefix = jax.random.randint(jax.random.key(9), (4, 3), 0, 11)
    draw = functools.partial(
        sample, model, params, LABELS, KEYS, temperature=0.0, known=prefix, pieces=3
    )
    codes = draw(guidance_scale=scales)
    np.testing.assert_array_equal(codes[:, :3], prefix)
    logits = compute_uncached_logits(model, params, LABELS, codes, scales[:, None])
    np.testing.assert_array_equal(codes[:, 3:], logits.argmax(-1)[:, 3:])
    assert (codes != draw(guidance_scale=0.0)).any() and (codes != draw(guidance_scale=4.0)).any()


def test_an_image_does_not_depend_on_the_others():
    model, params, _ = make_small_model()
    together = sample(model, params, LABELS, KEYS, top_p=0.9, top_k=8, guidance_scale=1.5)
    alone = sample(model, params, LABELS[2:3], KEYS[2:3], top_p=0.9, top_k=8, guidance_scale=1.5)
    np.testing.assert_array_equal(alone, together[2:3])
    assert (together[2] != together[3]).any(), "two images of the same class with different keys"


def test_samples_have_the_probabilities_of_the_model():
    model, params, _ = make_small_model(layers=1)
    n = 4000
    labels = jnp.ones(n, jnp.int32)
    codes = sample(model, params, labels, jax.random.split(jax.random.key(3), n), temperature=0.7)
    logits = compute_uncached_logits(model, params, labels[:1], codes[:1])[0, 0]
    expected = jax.nn.softmax(logits / 0.7)
    frequencies = np.bincount(codes[:, 0], minlength=11) / n
    # Four standard deviations of a frequency of 1/2, which has the largest deviation.
    assert np.abs(frequencies - expected).max() < 4 * np.sqrt(0.25 / n)


def test_a_guidance_scale_of_1_is_conditional_and_of_0_is_unconditional():
    model, params, _ = make_small_model()
    plain = sample(model, params, LABELS, KEYS)
    np.testing.assert_array_equal(sample(model, params, LABELS, KEYS, guidance_scale=1.0), plain)
    unconditional = sample(model, params, jnp.full(4, model.classes), KEYS)
    np.testing.assert_array_equal(
        sample(model, params, LABELS, KEYS, guidance_scale=0.0), unconditional
    )
    # The schedule starts unconditional and ends conditional.
    scales = jnp.where(jnp.arange(12) < 6, 0.0, 1.0)
    mixed = sample(model, params, LABELS, KEYS, guidance_scale=scales)
    np.testing.assert_array_equal(mixed[:, :6], unconditional[:, :6])


@pytest.mark.slow
def test_guidance_increases_the_agreement_with_a_classifier():
    """Trains a prior with label dropout on codes of three overlapping classes, and classifies its
    samples with the Bayes classifier."""
    rng = np.random.default_rng(0)
    log_probs = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 0.6, (3, 12, 11)), jnp.float32))
    model = make_small_model(width=32)[0]
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12), jnp.int32))["params"]
    adam = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        label_key, code_key, drop_key = jax.random.split(key, 3)
        labels = jax.random.randint(label_key, (256,), 0, 3)
        codes = jax.random.categorical(code_key, log_probs[labels])
        inputs = jnp.where(jax.random.bernoulli(drop_key, 0.2, (256,)), model.classes, labels)

        def loss(params):
            tokens = model.shift_right(inputs, codes)
            return next_token(model.apply({"params": params}, tokens), codes).mean()

        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = adam.init(params)
    for key in jax.random.split(jax.random.key(1), 300):
        params, state = step(params, state, key)
    labels = jnp.repeat(jnp.arange(3), 500)
    keys = jax.random.split(jax.random.key(2), 1500)
    agreement = {}
    for scale in (0.0, 1.0, 2.0):
        codes = sample(model, params, labels, keys, guidance_scale=scale)
        predicted = log_probs[:, jnp.arange(12), codes].sum(-1).argmax(0)
        agreement[scale] = float((predicted == labels).mean())
    assert abs(agreement[0.0] - 1 / 3) < 0.05, "without the class, the agreement is chance"
    assert agreement[1.0] > 0.6 and agreement[2.0] > agreement[1.0] + 0.05, agreement


def test_top_k_and_top_p_keep_the_most_likely_codes():
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.06, 0.04]]))

    def kept_codes(top_k, top_p):
        return np.flatnonzero(np.isfinite(exclude_unlikely(logits, 1.0, top_k, top_p)[0])).tolist()

    assert kept_codes(2, None) == [0, 2]
    assert kept_codes(5, None) == kept_codes(None, 1.0) == kept_codes(None, None) == [0, 1, 2, 3, 4]
    assert kept_codes(None, 0.79) == [0, 2]
    assert kept_codes(None, 0.81) == [0, 1, 2]
    assert kept_codes(None, 0.0) == [0]
    # Of the two most likely codes, the first has a probability of 0.625.
    assert kept_codes(2, 0.62) == [0] and kept_codes(2, 0.63) == [0, 2]


@pytest.mark.parametrize("top_k", [1, 7, 300, None])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, None])
def test_the_kept_codes_equal_a_plain_computation(top_k, top_p):
    logits = np.random.default_rng(3).normal(0, 2, (40, 300)).astype(np.float32)
    kept = np.isfinite(exclude_unlikely(jnp.asarray(logits), 0.7, top_k, top_p))
    for row, kept_row in zip(logits.astype(np.float64) / 0.7, kept, strict=True):
        order = np.argsort(-row)[: top_k or 300]
        probabilities = np.exp(row[order]) / np.exp(row[order]).sum()
        if top_p is not None:
            order = order[: 1 + np.searchsorted(probabilities.cumsum(), top_p)]
        assert set(np.flatnonzero(kept_row)) == set(order)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_cache_has_the_models_dtype_and_is_updated_in_place(dtype, scale):
    """The compiled loops over positions do not copy a layer's keys or values."""
    model, params, _ = make_small_model(width=32)
    model = model.clone(dtype=jnp.dtype(dtype))
    assert {x.dtype for layer in model.init_cache(8, 12) for x in layer} == {model.dtype}
    labels, keys = jnp.zeros(16, jnp.int32), jax.random.split(jax.random.key(0), 16)
    arguments = model, params, labels, keys
    text = compiled.lower(*arguments, guidance_scale=scale, pieces=2).compile().as_text()
    # In the second piece, the cache of a layer has 12 positions.
    sequences = 16 if scale is None else 32
    sizes = {sequences * 32 * positions for positions in (6, 12)}
    assert f"{sequences},2,12,16]" in text and " while(" in text
    assert count_copies_in_loops(text, lambda elements: elements in sizes) == 0


def test_known_codes_at_any_position_are_kept():
    """Known codes affect the codes after them, but not those before them."""
    model, params, _ = make_small_model()
    original = sample(model, params, LABELS, KEYS)
    known = jnp.where(jnp.arange(12) % 3 == 1, (original + 1) % 11, -1)
    codes = sample(model, params, LABELS, KEYS, temperature=0.0, known=known)
    np.testing.assert_array_equal(codes[:, 1::3], known[:, 1::3])
    most_likely = compute_uncached_logits(model, params, LABELS, codes).argmax(-1)
    np.testing.assert_array_equal(codes[known < 0], most_likely[known < 0])


def compute_reference_logits(model, params, codes, row, column, scale):
    """Returns a code's logits from a forward pass over the window as in the official notebook."""
    (rows, columns), (height, width) = model.window, codes.shape[1:]

    def locate(index, window, size):
        half = window // 2
        if index <= half:
            return index
        return window - (size - index) if size - index < window - half else half

    i, j = locate(row, rows, height), locate(column, columns, width)
    window = codes[:, row - i : row - i + rows, column - j : column - j + columns]
    logits = compute_uncached_logits(model, params, LABELS, window.reshape(len(codes), -1), scale)
    return logits.reshape(len(codes), rows, columns, -1)[:, i, j]


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, None), (MODERN, 2.0), ({"block_size": 10}, 2.0)],
    ids=["gpt2", "modern", "small block"],
)  # fmt: skip
def test_logits_in_a_window_are_those_of_a_plain_forward_pass(settings, scale):
    model, params, _ = make_small_model(**settings)
    assert model.window == ((3, 3) if "block_size" in settings else (3, 4))
    codes = jax.random.randint(jax.random.key(2), (4, 7, 9), 0, 11)
    logits = jax.jit(
        lambda row, column: windows.compute_window_logits(
            model, params, LABELS, codes, row, column, scale=scale
        )
    )
    for row in range(7):
        for column in range(9):
            expected = compute_reference_logits(model, params, codes, row, column, scale)
            golden.assert_close(logits(row, column), expected, f"{row}, {column}", 1e-5)


def test_greedy_codes_of_a_large_grid_are_the_most_likely_in_their_windows():
    model, params, _ = make_small_model()
    known = jnp.full((4, 63), -1).at[:, 20:30].set(5)
    codes = sample(model, params, LABELS, KEYS, grid=(7, 9), temperature=0.0, known=known)
    np.testing.assert_array_equal(codes[:, 20:30], 5)
    grids = codes.reshape(4, 7, 9)
    for position in range(63):
        logits = compute_reference_logits(model, params, grids, *divmod(position, 9), None)
        if known[0, position] < 0:
            np.testing.assert_array_equal(codes[:, position], logits.argmax(-1))


def test_a_window_as_large_as_the_grid_samples_the_same_codes_as_the_cache():
    model, params, _ = make_small_model()
    choose = make_token_sampler(KEYS, 1.0, None, 0.9)
    inputs = jnp.arange(12), jnp.full(12, 1.5), jnp.full((12, 4), -1)
    draw = jax.jit(windows.scan_windows, static_argnums=(0, 3, 5))
    codes = draw(model, params, LABELS, choose, inputs, (3, 4))
    expected = sample(model, params, LABELS, KEYS, top_p=0.9, guidance_scale=1.5)
    np.testing.assert_array_equal(codes, expected)


def test_batches_and_pieces_depend_only_on_the_kind_of_device():
    """So the codes of an image do not depend on what else is drawn."""
    cpu, gpu = (types.SimpleNamespace(platform=name) for name in ("cpu", "gpu"))
    assert (sampling_batch_size(cpu, 1024), sampling_batch_size(gpu, 1024)) == (8, 256)
    assert sampling_batch_size(gpu, 256 * 16384) == 64
    assert [sampling_pieces(cpu, length) for length in (16, 64, 100, 256, 1024)] == [1, 2, 4, 8, 8]
    assert [sampling_pieces(gpu, length) for length in (16, 64, 100, 256, 1024)] == [1, 2, 4, 4, 4]
