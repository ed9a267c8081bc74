"""Compares quantizers with plain float64 implementations of their equations."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from taming_jax.config.load import load_config
from taming_jax.models.quantizers import QUANTIZERS, Training
from tests import golden
from tests.small_networks import QUICKLY

fixed = lax.stop_gradient
# mnist_tiny normalizes.
NOT_NORMALIZED = {name: {"l2_normalise": False} for name in ("vq", "ema", "simvq", "ibq")}


def make_quantizer(name, codes, dim=None, axis_name=None, **settings):
    """Returns a quantizer. `settings` are its own, and batch_size is 6."""
    settings = NOT_NORMALIZED.get(name, {}) | settings
    overrides = {f"vqgan.{name}.{key}": value for key, value in settings.items()}
    overrides |= {} if dim is None else {"vqgan.code_dim": dim}
    overrides |= {"vqgan.quantizer": name, "vqgan.codebook_size": codes, "vqgan.batch_size": 6}
    return QUANTIZERS[name](load_config("mnist_tiny", overrides).vqgan, axis_name)


def make_training(batch=6):
    """Returns the inputs of training for the images of a batch."""
    keys = jax.random.split(jax.random.key(1), batch)
    return Training(keys, jnp.arange(batch), jax.random.key(2), jnp.float32(0.5))


def make_arrays(quantizer, scale=1.0):
    """Returns latents [6,3,4,d], parameters and a cotangent of the codes, as float32 numpy."""
    rng = np.random.default_rng(0)
    z = (scale * rng.normal(size=(6, 3, 4, quantizer.code_dim))).astype(np.float32)
    shapes = jax.eval_shape(quantizer.init, jax.random.key(3), z).get("params", {})
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return z, params, rng.normal(size=z.shape).astype(np.float32)


def differentiate(function, z, params, cotangent):
    """Returns (vectors, indices, loss) of a quantizer, and the gradients with respect to the
    latents and the parameters of loss.mean() plus the product of the codes with the cotangent."""

    def objective(z, params):
        vectors, indices, loss, *_ = function(z, params)
        return loss.mean() + (vectors * cotangent).sum(), (vectors, indices, loss)

    # Compiling one program is faster than compiling each operation.
    gradient = jax.value_and_grad(objective, (0, 1), has_aux=True)
    (_, outputs), gradients = jax.jit(gradient, compiler_options=QUICKLY)(z, params)
    return jax.device_get((outputs, gradients))


def compare(quantizer, reference, tolerance=1e-5, scale=1.0, training=None):
    """Compares values and gradients of a quantizer with those of reference(z, params), which
    returns (vectors, indices, loss) and is computed in float64. Returns the largest difference,
    relative to the largest value of each array."""
    arrays = make_arrays(quantizer, scale)

    def quantize(z, params):
        return quantizer.apply({"params": params}, z, training)

    outputs, gradients = differentiate(quantize, *arrays)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
        expected, expected_gradients = differentiate(reference, *exact)
    np.testing.assert_array_equal(outputs[1], expected[1])
    golden.assert_close(outputs[0], expected[0], "codes", tolerance, tolerance)
    golden.assert_close(outputs[2], expected[2], "loss", tolerance, tolerance)
    golden.assert_close(gradients[0], expected_gradients[0], "latents", tolerance, tolerance)
    golden.assert_trees_close(gradients[1], expected_gradients[1], "", tolerance, tolerance)
    lookup = quantizer.apply({"params": arrays[1]}, outputs[1], method="lookup")
    golden.assert_close(lookup, expected[0], "lookup", tolerance, tolerance)
    return outputs


def nearest(z, codes):
    """Returns the nearest code of each latent and its index."""
    indices = jnp.square(z[..., None, :] - codes).sum(-1).argmin(-1)
    return codes[indices], indices


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def entropy(p):
    return -(p * jnp.log(p)).sum(-1)


def penalty(logits, weight, diversity):
    """Returns the entropy penalty [b,h,w] of softmax(logits) [b,h,w,k]."""
    p = jax.nn.softmax(logits)
    return weight * (entropy(p) - diversity * entropy(p.mean((0, 1, 2))))
