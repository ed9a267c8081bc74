import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.config.quantizers import GumbelConfig
from taming_jax.config.schema import VQGANConfig
from taming_jax.models.quantizers import GumbelQuantizer, Training
from tests import golden


def test_the_gumbel_quantizer_equals_its_definition():
    rng = np.random.default_rng(3)
    z, codebook = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(9, 5))
    kernel, bias = rng.normal(size=(1, 1, 6, 9)), rng.normal(size=9)
    params = jax.tree.map(
        jnp.float32, {"codebook": codebook, "proj": {"kernel": kernel, "bias": bias}}
    )
    quantizer = GumbelQuantizer(
        VQGANConfig(
            quantizer="gumbel",
            codebook_size=9,
            code_dim=5,
            gumbel=GumbelConfig(temperature=(1.2, 0.2), kl_weight=0.3),
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
