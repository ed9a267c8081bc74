import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.errors import UserError
from taming_jax.models.quantizers import entropy
from tests import golden
from tests.models.quantizers import reference
from tests.models.quantizers.reference import fixed, make_quantizer, make_training


def list_codes(bits):
    """Returns all codes of +-1 [2^bits,bits] in the order of their indices."""
    return 2.0 * (np.arange(2**bits)[:, None] >> np.arange(bits) & 1) - 1


@pytest.mark.parametrize("bits", [1, 4, 5])
def test_values_and_gradients_equal_the_definition(bits):
    quantizer = make_quantizer(
        "lfq", 2**bits, commitment=0.3, entropy_weight=0.7, diversity_weight=0.4,
        entropy_temperature=2.0,
    )  # fmt: skip

    def quantize(z, params):
        codes, indices = reference.nearest(z, jnp.asarray(list_codes(bits)))
        loss = 0.3 * ((z - codes) ** 2).mean(-1)
        distances = jnp.square(z[..., None, :] - list_codes(bits)).sum(-1)
        loss += reference.penalty(-distances / 2.0, 0.7, 0.4)
        return z + fixed(codes - z), indices, loss

    reference.compare(quantizer, quantize, training=make_training())


def test_the_entropy_of_groups_is_summed():
    """Three groups of two bits: the mean distribution of each, by its definition."""
    quantizer = make_quantizer(
        "lfq", 64, commitment=0.0, entropy_weight=1.0, entropy_temperature=2.0, entropy_group_bits=2
    )
    codes = list_codes(2)

    def quantize(z, params):
        loss = 0
        for start in (0, 2, 4):
            distances = jnp.square(z[..., None, start : start + 2] - codes).sum(-1)
            loss += reference.penalty(-distances / 2.0, 1.0, 1.0)
        return *reference.nearest(z, jnp.asarray(list_codes(6))), loss

    z, params, _ = reference.make_arrays(quantizer)
    loss = quantizer.apply({"params": params}, z, make_training()).loss
    golden.assert_close(loss, quantize(z.astype(np.float64), {})[2], "loss", 1e-5)


def test_the_entropy_of_a_large_codebook_needs_no_array_of_latents_times_codes():
    quantizer = make_quantizer("lfq", 2**18)
    z = jax.ShapeDtypeStruct((6, 16, 16, 18), jnp.float32)

    def objective(z):
        return quantizer.apply({}, z, make_training()).loss.mean()

    compiled = jax.jit(jax.grad(objective)).lower(z).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    assert size < 40 * 2**20, "an array of latents times codes has 1.5 GiB"


def test_gradients_are_finite_for_certain_bits():
    quantizer = make_quantizer("lfq", 16)
    z = jnp.array([0.0, 1e4, -1e4, 1e-4]).reshape(1, 1, 1, 4)
    gradient = jax.grad(lambda z: quantizer.apply({}, z, make_training(1)).loss.sum())(z)
    assert np.isfinite(gradient).all()
    assert entropy.compute_entropy(jnp.array([0.0, 1.0])) == 0


@pytest.mark.parametrize("size", [1, 1000])
def test_only_powers_of_two_are_accepted(size):
    settings = {"vqgan.quantizer": "lfq", "vqgan.codebook_size": size}
    with pytest.raises(UserError, match=f"codebook-size is {size}; it must be a power of two"):
        load_config("mnist_tiny", settings)
