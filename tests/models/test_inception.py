"""InceptionV3 against what pytorch-fid's module (0.3.0, PyTorch 2.13) computed with the same random
weights, of which inception.npz keeps the answers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.data.pixels import to_float
from taming_jax.metrics.features import resized_legacy
from taming_jax.models.inception import CLASSES, InceptionV3
from taming_jax.weights.layout import expected, inception_layout, ours, paths
from tests.golden import assert_close


def known():
    """Our arrays' names and shapes, and where they stand in the official state dict."""
    found = paths(
        jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    )
    return found, inception_layout(found)


def random_weights(shapes):
    """The same for the same names and shapes, whoever asks."""
    rng = np.random.default_rng(0)
    found = {}
    for name in sorted(shapes):
        shape, last = shapes[name], name.rsplit(".", 1)[1]
        values = rng.standard_normal(shape, np.float32)
        if last == "running_var":
            values = 1 + np.tanh(values) / 2
        elif last == "weight" and len(shape) > 1:
            values *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        else:
            values = values / 10 + (last == "weight")
        found[name] = values.astype(np.float32)
    return found


def images():
    """Smooth ones [2,299,299,3] in [-1, 1], so that each layer has something to see."""
    y, x = np.mgrid[0:299, 0:299] / 50
    waves = np.random.default_rng(1).random((6, 3)) * 4
    planes = [np.sin(a * x + b) * np.cos(c * y) for a, b, c in waves]
    return np.stack(planes, -1).reshape(299, 299, 2, 3).transpose(2, 0, 1, 3).astype(np.float32)


def test_features_and_logits_are_pytorch_fids():
    recorded = np.load(Path(__file__).with_name("inception.npz"))
    shapes, layout = known()
    variables = ours(layout, random_weights(expected(layout, shapes)))
    small = np.random.default_rng(3).integers(0, 256, (2, 3, 40, 40)).transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        network = jax.jit(InceptionV3().apply)
        features, logits = network(variables, images())
        resized, _ = network(variables, resized_legacy(to_float(small)))
    assert logits.shape == (2, CLASSES)
    assert_close(features, recorded["features"], "features", 1e-4, 1e-6)
    assert_close(resized, recorded["resized"], "features of resized images", 1e-4, 1e-6)
    assert_close(logits, recorded["logits"], "logits", 1e-4, 1e-6)
