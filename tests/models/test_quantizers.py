import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.models.quantizers import VectorQuantizer
from tests import golden


@pytest.mark.parametrize("placing", ["legacy", "standard"])
def test_reproduces_the_official_quantizer_and_its_gradients(placing):
    recorded = golden.load("compvis_quantizer")
    z, upstream = golden.nhwc(recorded["z"]), golden.nhwc(recorded["upstream"])
    quantizer = VectorQuantizer(32, 6, float(recorded["beta"]), legacy=placing == "legacy")

    def objective(z, codebook):
        out = quantizer.apply({"params": {"codebook": codebook}}, z)
        return out.loss.mean() + (out.vectors * upstream).sum(), out

    gradients, out = jax.grad(objective, (0, 1), has_aux=True)(z, recorded["codebook"])
    np.testing.assert_array_equal(out.indices, recorded["indices"])
    golden.assert_close(out.vectors, golden.nhwc(recorded["quantized"]), "quantized")
    golden.assert_close(out.loss.mean(), recorded["loss"], "loss")
    golden.assert_close(gradients[0], golden.nhwc(recorded[f"{placing}/grad_z"]), "grad z")
    golden.assert_close(gradients[1], recorded[f"{placing}/grad_codebook"], "grad codebook")


def test_chooses_the_nearest_code_by_brute_force_in_float64():
    rng = np.random.default_rng(0)
    z, codebook = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(40, 6))
    variables = {"params": {"codebook": jnp.asarray(codebook, jnp.float32)}}
    plain = VectorQuantizer(40, 6).apply(variables, jnp.asarray(z, jnp.float32))
    distances = ((z[..., None, :] - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(plain.indices, distances.argmin(-1))

    directions = VectorQuantizer(40, 6, l2_normalise=True).apply(variables, jnp.float32(z))
    cosines = (z @ codebook.T) / np.linalg.norm(codebook, axis=-1)
    np.testing.assert_array_equal(directions.indices, cosines.argmax(-1))
    np.testing.assert_allclose(jnp.linalg.norm(directions.vectors, axis=-1), 1, rtol=1e-5)


def test_l2_normalised_codes_do_not_depend_on_lengths():
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.float32)
    codebook = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    quantizer = VectorQuantizer(16, 4, l2_normalise=True)
    one = quantizer.apply({"params": {"codebook": codebook}}, z)
    other = quantizer.apply({"params": {"codebook": 3 * codebook}}, 0.2 * z)
    np.testing.assert_array_equal(one.indices, other.indices)
    golden.assert_close(other.loss, one.loss, "loss", 1e-5)
    looked_up = quantizer.apply(
        {"params": {"codebook": codebook}}, one.indices, method=VectorQuantizer.lookup
    )
    golden.assert_close(looked_up, one.vectors, "lookup", 1e-5)
    gradient = jax.grad(lambda z: quantizer.apply({"params": {"codebook": codebook}}, z).loss.sum())
    assert np.isfinite(gradient(jnp.zeros((1, 1, 1, 4)))).all()
