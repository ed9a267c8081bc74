import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax import losses

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(0, 2, (2, 3, 4, 4, 1))


def test_losses_return_one_number_per_example():
    x, y = RNG.uniform(-1, 1, (2, 3, 5, 5, 2))
    np.testing.assert_allclose(losses.l1(x, y), np.abs(x - y).mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(losses.generator_adversarial(FAKE), -FAKE.mean((1, 2, 3)), rtol=1e-6)
    hinge = (np.maximum(1 - REAL, 0) + np.maximum(1 + FAKE, 0)).mean((1, 2, 3)) / 2
    np.testing.assert_allclose(losses.hinge(REAL, FAKE), hinge, rtol=1e-6)
    sigmoid = 1 / (1 + np.exp(-np.stack([REAL, -FAKE])))
    vanilla = -np.log(sigmoid).mean((0, 2, 3, 4))
    np.testing.assert_allclose(losses.vanilla(REAL, FAKE), vanilla, rtol=1e-5)


def test_the_adaptive_weight_is_a_bounded_ratio_of_norms():
    a, b = RNG.normal(size=(2, 3, 3, 8, 1))
    ratio = np.linalg.norm(a) / (np.linalg.norm(b) + 1e-4)
    assert losses.adaptive_weight(a, b) == pytest.approx(ratio, rel=1e-6)
    assert losses.adaptive_weight(a, b, 0.5) == 0.5
    assert losses.adaptive_weight(a, 0 * b) == 1e4


def test_lecam_is_zero_within_the_averages():
    logits = jnp.array([[0.2, -0.2]])
    np.testing.assert_allclose(losses.lecam(logits, logits, -0.2, 0.2), 0)
    np.testing.assert_allclose(
        losses.lecam(logits, logits, 0.0, 0.0), (0.2**2 + 0.2**2) / 2, rtol=1e-6
    )


def test_the_perplexity_of_equally_frequent_codes_is_their_number():
    assert losses.perplexity(jnp.full(16, 7.0)) == pytest.approx(16, rel=1e-6)
    assert losses.perplexity(jnp.zeros(16).at[3].set(5)) == pytest.approx(1)
    assert losses.perplexity(jnp.zeros(16).at[:4].set(5)) == pytest.approx(4, rel=1e-6)


def test_the_loss_of_the_next_token_is_the_negative_log_likelihood():
    logits, codes = RNG.normal(0, 3, (2, 5, 7)), RNG.integers(0, 7, (2, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.next_token(logits, codes), -np.log(chosen).mean(1), rtol=1e-5)
