import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.priors.dropout import dropout, random_bits
from taming_jax.training.state import DROPOUT, make_example_keys

SHAPE = (64, 128)  # positions and channels


def make_keys(step, examples=32):
    keys = make_example_keys(0, DROPOUT, step, jnp.arange(examples))
    return jax.random.key_data(keys)


def measure_correlation(left, right):
    """Returns the correlation of two arrays in units of the standard deviation that it has if they
    are independent."""
    return np.corrcoef(left.ravel(), right.ravel())[0, 1] * np.sqrt(left.size)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_the_mean_and_the_variance_are_those_of_independent_draws(rate):
    draw = jax.jit(lambda keys: dropout(jnp.ones((len(keys), 512, 640)), rate, keys, 3))
    x = np.asarray(draw(make_keys(7)), np.float64)
    n = x.size
    assert n > 10**7 and set(np.unique(x)) == {0, np.float64(np.float32(1 / (1 - rate)))}
    kept = (x > 0).sum()
    assert abs(kept - (1 - rate) * n) < 4 * np.sqrt(rate * (1 - rate) * n)
    # The sums of disjoint blocks have the variance of sums of independent draws.
    block = x.reshape(-1, 1024).sum(1)
    variance = 1024 * rate / (1 - rate)
    assert abs(block.var() / variance - 1) < 4 * np.sqrt(2 / len(block))


def test_masks_of_neighbors_are_independent():
    draw = jax.jit(random_bits, static_argnums=(1, 2))
    bits = np.asarray(draw(make_keys(0), 1, SHAPE))
    pairs = {
        "channels": (bits[..., 1:], bits[..., :-1]),
        "positions": (bits[:, 1:], bits[:, :-1]),
        "examples": (bits[1:], bits[:-1]),
        "layers": (bits, np.asarray(draw(make_keys(0), 2, SHAPE))),
        "steps": (bits, np.asarray(draw(make_keys(1), 1, SHAPE))),
    }
    for name, pair in pairs.items():
        assert abs(measure_correlation(*pair)) < 4, name
        assert abs(measure_correlation(*(x > 2**31 for x in pair))) < 4, name
    assert len(np.unique(bits)) > 0.99 * bits.size


def test_extreme_rates_and_inference():
    x = jnp.ones((2, 3), jnp.bfloat16)
    keys = make_keys(0, 2)
    assert (dropout(x, 0.0, keys, 0) == 1).all() and (dropout(x, 0.5, None, 0) == 1).all()
    assert (dropout(x, 1.0, keys, 0) == 0).all()


def test_the_mean_of_bfloat16_numbers_stays_the_same():
    """Rounding the scale 1 / (1 - rate) to bfloat16 would change it by 0.2%. The rounding of the
    results averages out, since the numbers differ."""
    x = jax.random.uniform(jax.random.key(0), (32, 256, 256), minval=0.5)
    for rate in (0.1, 0.2, 0.3):
        y = dropout(x.astype(jnp.bfloat16), rate, make_keys(0), 0)
        assert y.dtype == jnp.bfloat16
        kept = np.asarray(y, np.float64) > 0
        scale = np.asarray(y, np.float64)[kept].mean() / np.asarray(x, np.float64)[kept].mean()
        assert scale == pytest.approx(1 / (1 - rate), rel=2e-4)
