import jax
import jax.numpy as jnp
import pytest

from tests.models.quantizers import reference
from tests.models.quantizers.reference import fixed, make_quantizer, make_training, unit


@pytest.mark.parametrize("l2_normalise", [False, True])
def test_values_and_gradients_equal_the_definition(l2_normalise):
    quantizer = make_quantizer(
        "ibq", 16, 5, commitment=0.4, entropy_weight=0.7, diversity_weight=0.4,
        entropy_temperature=0.5, l2_normalise=l2_normalise,
    )  # fmt: skip

    def quantize(z, params):
        codes = params["codebook"]
        if l2_normalise:
            z, codes = unit(z), unit(codes)
        products = jnp.einsum("bhwd,kd->bhwk", z, codes)
        scores = products * (10 if l2_normalise else 1)
        soft = jnp.exp(scores) / jnp.exp(scores).sum(-1, keepdims=True)
        hard = jax.nn.one_hot(scores.argmax(-1), 16)
        q, e = (hard + soft - fixed(soft)) @ codes, hard @ codes
        terms = (q - z) ** 2 + (fixed(e) - z) ** 2 + 0.4 * (e - fixed(z)) ** 2
        loss = terms.mean(-1) + reference.penalty(products / 0.5, 0.7, 0.4)
        return q, scores.argmax(-1), loss

    reference.compare(quantizer, quantize, training=make_training())


def test_every_code_gets_a_gradient():
    quantizer = make_quantizer("ibq", 64, 5, entropy_weight=0.0)
    z, params, cotangent = reference.make_arrays(quantizer)

    def quantize(z, params):
        return quantizer.apply({"params": params}, z, make_training())

    (_, indices, _), (_, gradient) = reference.differentiate(quantize, z, params, cotangent)
    assert len(set(indices.ravel().tolist())) < 40 and (gradient["codebook"] != 0).all()
