import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden
from tests.models.quantizers import reference
from tests.models.quantizers.reference import fixed, make_quantizer, make_training, nearest, unit


def test_values_and_gradients_equal_the_definition():
    quantizer = make_quantizer("ema", 16, 5, commitment=0.4)

    def quantize(z, params):
        vectors, indices = nearest(z, fixed(params["codebook"]))
        return z + fixed(vectors - z), indices, 0.4 * ((z - fixed(vectors)) ** 2).mean(-1)

    reference.compare(quantizer, quantize, training=make_training())


@pytest.mark.parametrize("l2_normalise", [False, True])
def test_the_codebook_follows_the_averages_of_the_paper(l2_normalise):
    """Appendix A.1 of arXiv 1711.00937 in float64, from N = 1 and m = e."""
    quantizer = make_quantizer("ema", 16, 5, decay=0.8, l2_normalise=l2_normalise)
    _, params, _ = reference.make_arrays(quantizer)
    state, rng = quantizer.init_state(), np.random.default_rng(4)
    number, total = np.ones(16), params["codebook"].astype(np.float64)
    for _ in range(20):
        z = rng.normal(size=(6, 3, 4, 5)).astype(np.float32)
        codes = total / number[:, None]
        latents = (unit(z) if l2_normalise else z).reshape(-1, 5)
        indices = nearest(latents, unit(codes) if l2_normalise else codes)[1]
        one_hot = np.eye(16)[np.asarray(indices)]
        number = 0.8 * number + 0.2 * one_hot.sum(0)
        total = 0.8 * total + 0.2 * one_hot.T @ latents
        quantized = quantizer.apply({"params": params}, z, make_training())
        np.testing.assert_array_equal(quantized.indices.ravel(), indices)
        counts = jnp.asarray(one_hot.sum(0), jnp.float32)
        params, state = quantizer.update(params, state, quantized.statistics | {"counts": counts})
    golden.assert_close(state["usage"], number, "N", 1e-5)
    golden.assert_close(params["codebook"], total / number[:, None], "codes", 1e-5)


def test_an_unused_code_stays_the_same_even_when_its_average_underflows():
    quantizer = make_quantizer("ema", 16, 5, decay=0.5)
    _, params, _ = reference.make_arrays(quantizer)
    nothing = {"counts": jnp.zeros(16), "sums": jnp.zeros((16, 5))}
    updated, state = params, quantizer.init_state()
    for _ in range(200):
        updated, state = quantizer.update(updated, state, nothing)
    assert (state["usage"] == 0).all()
    np.testing.assert_array_equal(updated["codebook"], params["codebook"])
    sums = jnp.ones((16, 5))
    updated, _ = quantizer.update(updated, state, {"counts": jnp.ones(16), "sums": sums})
    golden.assert_close(updated["codebook"], sums, "the latents of the first use", 1e-6)


def test_a_restarted_code_counts_as_one_latent():
    quantizer = make_quantizer("ema", 4, 5, restart_after=1)
    _, params, _ = reference.make_arrays(quantizer)
    statistics = {
        "counts": jnp.array([7.0, 0, 0, 1]), "sums": jnp.zeros((4, 5)),
        "candidates": jnp.ones((4, 5)),
    }  # fmt: skip
    updated, state = quantizer.update(params, quantizer.init_state(), statistics)
    golden.assert_close(state["usage"], [1.06, 1, 1, 1], "usage", 1e-6)
    assert (updated["codebook"][1:3] == 1).all() and (updated["codebook"][::3] != 1).all()
