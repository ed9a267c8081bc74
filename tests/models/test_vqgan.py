import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.cli.report.parity import RECORDED
from taming_jax.config.load import load_config
from taming_jax.interop.compvis import build_vqgan_layout
from taming_jax.models.vqgan import VQGAN, build_vqgan, decode_indices
from tests import golden


def decode(model, params, indices):
    apply = jax.jit(functools.partial(model.apply, method=VQGAN.decode_indices))
    return apply({"params": params}, indices)


@pytest.fixture(scope="module")
def official():
    """Returns the recorded outputs of the official model, and its parameters."""
    recorded = golden.load("compvis_vqgan")
    model = build_vqgan(load_config("mnist", RECORDED))
    ours = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return recorded, golden.convert_state_dict(
        build_vqgan_layout, ours, golden.select_prefix(recorded, "sd/")
    )


def test_the_model_reproduces_the_official_one(official):
    recorded, params = official
    model = build_vqgan(load_config("mnist", RECORDED))
    x = golden.to_nhwc(recorded["x"])

    @jax.jit
    def forward(params, x):
        h = model.apply({"params": params}, x, method=lambda m, x: m.encoder(x))
        z = model.apply({"params": params}, h, method=lambda m, h: m.quant_conv(h))
        return h, z, model.apply({"params": params}, x)

    h, z, (reconstruction, quantized) = forward(params, x)
    golden.assert_close(h, golden.to_nhwc(recorded["h"]), "encoder")
    golden.assert_close(z, golden.to_nhwc(recorded["pre_quant"]), "latents")
    golden.assert_close(
        quantized.vectors, golden.to_nhwc(recorded["quantized"]), "quantized latents"
    )
    golden.assert_close(quantized.loss.mean(), recorded["loss"], "quantizer's loss")
    golden.assert_close(
        reconstruction, golden.to_nhwc(recorded["reconstruction"]), "reconstruction"
    )
    np.testing.assert_array_equal(quantized.indices, recorded["indices"])
    decoded = decode(model, params, quantized.indices)
    golden.assert_close(decoded, reconstruction, "decoded indices", 1e-5)


@pytest.mark.slow
def test_parameters_and_outputs_of_a_bfloat16_model_are_float32():
    config = load_config("mnist_tiny", {"dtype": "bfloat16"})
    model = build_vqgan(config)
    images = jax.random.uniform(jax.random.key(1), (2, 28, 28, 1), minval=-1)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    low = jax.jit(model.apply)({"params": params}, images)
    assert low.images.dtype == low.quantized.loss.dtype == jnp.float32
    # Both models decode the same codes, because rounding could change a code. bfloat16 has 8 bits,
    # so the images differ slightly from those of float32.
    decoded, exact = (
        decode(m, params, low.quantized.indices)
        for m in (model, build_vqgan(load_config("mnist_tiny")))
    )
    assert 0 < np.abs(decoded - exact).mean() < 0.03 * np.abs(exact).mean()


@pytest.mark.slow
def test_many_pixels_are_decoded_in_equal_parts(monkeypatch):
    """Six images of 16x16 pixels, of which four fit at once, are decoded as two times three."""
    config = load_config("mnist_tiny", {"data.image_size": 16})
    model = build_vqgan(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    indices = jax.random.randint(jax.random.key(1), (6, config.grid_size, config.grid_size), 0, 128)
    images = decode_indices(model, params, indices)
    monkeypatch.setattr("taming_jax.models.vqgan.MAX_PIXELS", 4 * 16 * 16)
    in_parts = jax.jit(functools.partial(decode_indices, model))
    np.testing.assert_allclose(in_parts(params, indices), images, atol=1e-5)
    shapes = in_parts.lower(params, indices).as_text()
    assert "tensor<3x16x16x" in shapes and "tensor<6x16x16x16x" not in shapes
