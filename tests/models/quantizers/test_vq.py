import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.config.quantizers import VQConfig
from taming_jax.config.schema import VQGANConfig
from taming_jax.errors import UserError
from taming_jax.models import quantizers
from taming_jax.models.quantizers import VectorQuantizer
from taming_jax.models.vqgan import build_vqgan
from tests import golden
from tests.training.test_precision import iterate_operations


def make_quantizer(codebook_size, code_dim, **settings):
    vq = VQConfig(**settings)
    return VectorQuantizer(VQGANConfig(codebook_size=codebook_size, code_dim=code_dim, vq=vq))


@pytest.mark.parametrize("variant", ["legacy", "standard"])
def test_the_quantizer_reproduces_the_official_one_and_its_gradients(variant):
    recorded = golden.load("compvis_quantizer")
    z, upstream = golden.to_nhwc(recorded["z"]), golden.to_nhwc(recorded["upstream"])
    beta, legacy = float(recorded["beta"]), variant == "legacy"
    quantizer = make_quantizer(32, 6, commitment=beta, legacy_commitment=legacy)

    def objective(z, codebook):
        out = quantizer.apply({"params": {"codebook": codebook}}, z)
        return out.loss.mean() + (out.vectors * upstream).sum(), out

    gradients, out = jax.grad(objective, (0, 1), has_aux=True)(z, recorded["codebook"])
    np.testing.assert_array_equal(out.indices, recorded["indices"])
    golden.assert_close(out.vectors, golden.to_nhwc(recorded["quantized"]), "quantized")
    golden.assert_close(out.loss.mean(), recorded["loss"], "loss")
    golden.assert_close(gradients[0], golden.to_nhwc(recorded[f"{variant}/grad_z"]), "grad z")
    golden.assert_close(gradients[1], recorded[f"{variant}/grad_codebook"], "grad codebook")


def test_the_quantizer_chooses_the_nearest_code():
    rng = np.random.default_rng(0)
    z, codebook = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(40, 6))
    variables = {"params": {"codebook": jnp.asarray(codebook, jnp.float32)}}
    plain = make_quantizer(40, 6).apply(variables, jnp.asarray(z, jnp.float32))
    distances = ((z[..., None, :] - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(plain.indices, distances.argmin(-1))

    directions = make_quantizer(40, 6, l2_normalise=True).apply(variables, jnp.float32(z))
    cosines = (z @ codebook.T) / np.linalg.norm(codebook, axis=-1)
    np.testing.assert_array_equal(directions.indices, cosines.argmax(-1))
    np.testing.assert_allclose(jnp.linalg.norm(directions.vectors, axis=-1), 1, rtol=1e-5)


def test_l2_normalized_codes_do_not_depend_on_norms():
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.float32)
    codebook = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    quantizer = make_quantizer(16, 4, l2_normalise=True)
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


def test_the_backward_pass_has_no_array_with_an_entry_per_latent_and_code():
    """A lookup by a product with one-hot vectors would have several."""
    quantizer, z = make_quantizer(300, 4, l2_normalise=True), jnp.zeros((2, 5, 5, 4))
    params = quantizer.init(jax.random.key(0), z)

    def objective(params, z):
        out = quantizer.apply(params, z)
        return out.loss.mean() + (out.vectors**2).sum()

    def count_large_arrays(function):
        operations = iterate_operations(jax.make_jaxpr(function)(params, z))
        return sum(out.aval.shape == (2, 5, 5, 300) for op in operations for out in op.outvars)

    forward = count_large_arrays(objective)
    assert forward > 0, "the distances"
    assert count_large_arrays(jax.grad(objective, (0, 1))) == forward


def test_a_quantizer_with_another_number_of_codes_than_the_settings_is_refused(monkeypatch):
    class Binary(VectorQuantizer):
        @property
        def num_codes(self):
            return 2**self.settings.code_dim

    monkeypatch.setitem(quantizers.QUANTIZERS, "vq", Binary)
    settings = {"vqgan.code_dim": 6, "vqgan.codebook_size": 32}
    with pytest.raises(UserError, match="codebook-size is 32, but .* vq give 64 codes"):
        build_vqgan(load_config("mnist_tiny", settings))
    assert build_vqgan(load_config("mnist_tiny", settings | {"vqgan.codebook_size": 64}))
