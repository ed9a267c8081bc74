import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.quantizers import reference
from tests.models.quantizers.reference import fixed, make_quantizer, nearest, unit


@pytest.mark.parametrize("l2_normalise", [False, True])
def test_values_and_gradients_equal_the_definition(l2_normalise):
    quantizer = make_quantizer("simvq", 16, 5, commitment=0.4, l2_normalise=l2_normalise)

    def quantize(z, params):
        codes = fixed(params["codebook"]) @ params["kernel"]
        if l2_normalise:
            z, codes = unit(z), unit(codes)
        vectors, indices = nearest(z, codes)
        loss = ((fixed(z) - vectors) ** 2 + 0.4 * (z - fixed(vectors)) ** 2).mean(-1)
        return z + fixed(vectors - z), indices, loss

    reference.compare(quantizer, quantize)


def test_only_the_linear_map_is_trained():
    quantizer = make_quantizer("simvq", 16, 5)
    z, params, cotangent = reference.make_arrays(quantizer)

    def quantize(z, params):
        return quantizer.apply({"params": params}, z)

    _, (_, gradient) = reference.differentiate(quantize, z, params, cotangent)
    assert (gradient["codebook"] == 0).all() and (gradient["kernel"] != 0).all()
    variance = np.var(quantizer.init(jax.random.key(0), z)["params"]["codebook"])
    assert jnp.abs(variance * 5 - 1) < 0.5
