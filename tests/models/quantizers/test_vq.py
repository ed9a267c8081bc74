import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.config.quantizers import GumbelConfig, VQConfig
from taming_jax.config.schema import VQGANConfig
from taming_jax.errors import UserError
from taming_jax.models import quantizers
from taming_jax.models.quantizers import GumbelQuantizer, Training, VectorQuantizer
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


def test_the_gumbel_quantizer_equals_its_definition():
    rng = np.random.default_rng(3)
    z, codebook = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(9, 5))
    kernel, bias = rng.normal(size=(1, 1, 6, 9)), rng.normal(size=9)
    params = jax.tree.map(
        jnp.float32, {"codebook": codebook, "proj": {"kernel": kernel, "bias": bias}}
    )
    quantizer = GumbelQuantizer(
        VQGANConfig(
            codebook_size=9, code_dim=5, gumbel=GumbelConfig(temperature=(1.2, 0.2), kl_weight=0.3)
        )
    )

    def quantize(params, z, training=None):
        return quantizer.apply({"params": params}, z, training)

    logits, codes = z @ kernel[0, 0] + bias, codebook
    plain = quantize(params, jnp.float32(z))
    np.testing.assert_array_equal(plain.indices, logits.argmax(-1))
    np.testing.assert_allclose(plain.vectors, codes[logits.argmax(-1)], rtol=1e-5)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = 0.3 * (probabilities * np.log(probabilities * 9 + 1e-10)).sum(-1)
    np.testing.assert_allclose(plain.loss, expected, rtol=1e-4, atol=1e-5)
    lookup = quantizer.apply({"params": params}, plain.indices, method=GumbelQuantizer.lookup)
    np.testing.assert_allclose(lookup, plain.vectors, rtol=1e-5)

    keys, temperature = jax.random.split(jax.random.key(1)), 0.7
    # Half of the run is done, so that the cosine schedule is in the middle of 1.2 and 0.2.
    training = Training(keys, jnp.arange(2), jax.random.key(2), jnp.float32(0.5))
    sampled = quantize(params, jnp.float32(z), training)
    gumbel = np.stack([jax.random.gumbel(key, logits.shape[1:]) for key in keys])
    scaled = (logits + gumbel) / temperature
    np.testing.assert_array_equal(sampled.indices, scaled.argmax(-1))
    np.testing.assert_allclose(sampled.vectors, codes[scaled.argmax(-1)], rtol=1e-5)
    assert (sampled.indices != plain.indices).any()
    # The backward pass uses the soft choice, although the forward pass does not.
    upstream = rng.normal(size=sampled.vectors.shape)

    def soft_objective(params, z):
        logits = z @ params["proj"]["kernel"][0, 0] + params["proj"]["bias"]
        soft_choice = jax.nn.softmax((logits + gumbel) / temperature)
        return (soft_choice @ params["codebook"] * upstream).sum()

    def hard_objective(params, z):
        return (quantize(params, z, training).vectors * upstream).sum()

    gradients = jax.grad(hard_objective, (0, 1))(params, jnp.float32(z))
    expected = jax.grad(soft_objective, (0, 1))(params, jnp.float32(z))
    golden.assert_close(gradients[1], expected[1], "latents", 1e-4)
    golden.assert_trees_close(gradients[0]["proj"], expected[0]["proj"], "projection", 1e-4)
    one_hot = np.eye(len(codes))[scaled.argmax(-1)].reshape(-1, len(codes))
    codebook_gradient = one_hot.T @ upstream.reshape(-1, 5)
    golden.assert_close(gradients[0]["codebook"], codebook_gradient, "codebook", 1e-4)


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
