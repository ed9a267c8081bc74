"""A small classifier for MNIST digits, which is trained when it is first needed. Its features
replace those of InceptionV3, and its predictions show whether samples match their classes."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from taming_jax.data.batches import permute_epoch
from taming_jax.data.datasets import Split
from taming_jax.data.pixels import to_float
from taming_jax.progress import Progress
from taming_jax.storage import cache_arrays, read_arrays

FEATURES = 128
EPOCHS, BATCH, RATE = 3, 128, 2e-3
VERSION = 1  # increase it with every change here that affects the trained parameters


class Classifier(nn.Module):
    """A network that maps images float [b,h,w,c] in [-1, 1] to features [b,128] and class logits
    [b,k]."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images
        for features in (16, 32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return x, nn.Dense(self.classes)(x)


def shift_randomly(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts each image [b,h,w,c] by up to two pixels at random, since samples are less well
    centered than the digits of the dataset."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    starts = jax.random.randint(key, (len(images), 2), 0, 5)

    def crop(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, starts)


def train_classifier(train: Split, classes: int) -> Any:
    """Trains a classifier for three epochs on uint8 images and returns its parameters, which are
    the same for the same images."""
    model = Classifier(classes)
    steps = EPOCHS * (len(train.images) // BATCH)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    params = model.init(jax.random.key(0), jnp.zeros((1, *train.images.shape[1:])))["params"]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            shifted = shift_randomly(key, to_float(images))
            logits = model.apply({"params": params}, shifted)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    per_epoch = len(train.images) // BATCH
    with Progress("training a classifier", steps, "steps") as progress:
        for index in range(steps):
            epoch, batch = divmod(index, per_epoch)
            rows = permute_epoch(0, epoch, len(train.images))[batch * BATCH : (batch + 1) * BATCH]
            key = jax.random.fold_in(jax.random.key(1), index)
            params, state = step(params, state, train.images[rows], train.labels[rows], key)
            progress.update()
    return jax.tree.map(np.asarray, params)


def load_or_train(file: Path, train: Split, classes: int) -> Any:
    """Returns the parameters from a file. If the file is missing or damaged, trains a classifier
    and writes the file."""
    arrays = read_arrays(file)
    if arrays is None:
        arrays = traverse_util.flatten_dict(train_classifier(train, classes), sep="/")
        cache_arrays(file, arrays)
    return traverse_util.unflatten_dict(arrays, sep="/")
