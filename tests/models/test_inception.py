"""Compares InceptionV3 with pytorch-fid (0.3.0, PyTorch 2.13). The file inception.npz contains the
outputs of pytorch-fid for the same random weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.data.pixels import to_float
from taming_jax.metrics.features import resize_legacy
from taming_jax.models.inception import CLASSES, InceptionV3
from taming_jax.weights.layout import (
    build_inception_layout,
    convert_shapes,
    convert_to_flax,
    flatten_shapes,
)
from tests.golden import assert_close


def build_official_layout():
    """Returns the names and shapes of our arrays, and their layout in the official state dict."""
    shapes = flatten_shapes(
        jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    )
    return shapes, build_inception_layout(shapes)


def random_weights(shapes):
    """Returns weights that depend only on the names and shapes."""
    rng = np.random.default_rng(0)
    weights = {}
    for name in sorted(shapes):
        shape, last = shapes[name], name.rsplit(".", 1)[1]
        values = rng.standard_normal(shape, np.float32)
        if last == "running_var":
            values = 1 + np.tanh(values) / 2
        elif last == "weight" and len(shape) > 1:
            values *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        else:
            values = values / 10 + (last == "weight")
        weights[name] = values.astype(np.float32)
    return weights


def make_images():
    """Returns smooth images [2,299,299,3] in [-1, 1], to which every layer responds."""
    y, x = np.mgrid[0:299, 0:299] / 50
    waves = np.random.default_rng(1).random((6, 3)) * 4
    planes = [np.sin(a * x + b) * np.cos(c * y) for a, b, c in waves]
    return np.stack(planes, -1).reshape(299, 299, 2, 3).transpose(2, 0, 1, 3).astype(np.float32)


def test_features_and_logits_equal_those_of_pytorch_fid():
    recorded = np.load(Path(__file__).with_name("inception.npz"))
    shapes, layout = build_official_layout()
    variables = convert_to_flax(layout, random_weights(convert_shapes(layout, shapes)))
    small = np.random.default_rng(3).integers(0, 256, (2, 3, 40, 40)).transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        network = jax.jit(InceptionV3().apply)
        features, logits = network(variables, make_images())
        resized, _ = network(variables, resize_legacy(to_float(small)))
    assert logits.shape == (2, CLASSES)
    assert_close(features, recorded["features"], "features", 1e-4, 1e-6)
    assert_close(resized, recorded["resized"], "features of resized images", 1e-4, 1e-6)
    assert_close(logits, recorded["logits"], "logits", 1e-4, 1e-6)
