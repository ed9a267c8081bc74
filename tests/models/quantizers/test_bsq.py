import jax.numpy as jnp
import numpy as np

from tests.models.quantizers import reference
from tests.models.quantizers.reference import entropy, fixed, make_quantizer, make_training, unit
from tests.models.quantizers.test_lfq import list_codes


def test_values_and_gradients_equal_the_definition():
    """The entropy of each position over all codes, and that of the mean with independent bits."""
    quantizer = make_quantizer(
        "bsq", 16, commitment=0.3, entropy_weight=0.7, diversity_weight=0.4, entropy_temperature=0.5
    )

    def quantize(z, params):
        u, codes = unit(z), jnp.asarray(list_codes(4)) / 2
        vectors, indices = reference.nearest(u, codes)
        loss = 0.3 * ((u - vectors) ** 2).sum(-1)
        logits = 4 * u @ codes.T  # tau = 2 / temperature
        p = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
        bits = p @ (list_codes(4) + 1) / 2  # the probability that each bit is 1
        mean = bits.mean((0, 1, 2))
        loss += 0.7 * (entropy(p) - 0.4 * (entropy(jnp.stack([mean, 1 - mean], -1))).sum())
        return u + fixed(vectors - u), indices, loss

    reference.compare(quantizer, quantize, training=make_training())


def test_codes_have_unit_length_and_depend_on_the_direction_only():
    quantizer = make_quantizer("bsq", 64)
    z, _, _ = reference.make_arrays(quantizer)
    one, other = quantizer.apply({}, z), quantizer.apply({}, 5 * z)
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(one.vectors, axis=-1), 1, rtol=1e-5)
