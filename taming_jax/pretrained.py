"""Trained weights as a folder of plain files, which need neither Orbax nor pickle.

config.json        the settings, without those of the machine, such as paths
model.safetensors  the networks: arrays named after their paths, as in generator.decoder.conv_in
dataset.json       the fingerprint of the training data, with the names of the classes
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from taming_jax.config.load import read_config, remove_machine_settings, write_config
from taming_jax.config.schema import Config
from taming_jax.errors import UserError
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.vqgan import build_vqgan
from taming_jax.priors.registry import build_prior
from taming_jax.storage import atomic_write
from taming_jax.weights.arrays import flatten_arrays, hash_arrays
from taming_jax.weights.layout import flatten_shapes
from taming_jax.weights.state_dict import check_state_dict, open_safetensors, write_state_dict

FILES = CONFIG, WEIGHTS, DATASET = "config.json", "model.safetensors", "dataset.json"
FORMAT = "taming_jax 1"


class Model(NamedTuple):
    """What the shapes of a run's networks follow from: its config, the class names of its prior
    (empty without a prior), and whether it has a discriminator."""

    config: Config
    class_names: tuple[str, ...]
    discriminator: bool = False


class Pretrained(NamedTuple):
    """The content of a folder. `networks` holds the parameters of the generator and, if they are
    there, of the transformer and the discriminator (with its `batch_stats`), as trees of float32.
    `dataset` is the fingerprint of the training data, or None if that is not known."""

    config: Config
    step: int
    dataset: dict[str, Any] | None
    networks: dict[str, Any]

    @property
    def model(self) -> Model:
        names = (
            (self.dataset or {}).get("class_names", ()) if "transformer" in self.networks else ()
        )
        return Model(self.config, tuple(names), "discriminator" in self.networks)


def compute_shapes(model: Model) -> dict[str, Any]:
    """Returns the shapes of a model's parameters and batch statistics: one tree per network."""
    data, settings = model.config.data, model.config.vqgan
    image = jnp.zeros((1, data.image_size, data.image_size, data.channels))
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    shapes = {"generator": jax.eval_shape(build_vqgan(model.config).init, key, image)["params"]}
    if model.discriminator:
        net = Discriminator(settings.discriminator_filters, settings.discriminator_layers)
        shapes["discriminator"] = dict(jax.eval_shape(lambda: net.init(key, image, train=False)))
    if model.class_names:
        prior = build_prior(model.config, len(model.class_names))
        shapes["transformer"] = jax.eval_shape(prior.init, key, tokens)["params"]
    return shapes


def write_pretrained(folder: Path, content: Pretrained) -> None:
    """Writes the files into a folder. Raises OSError if they cannot be written."""
    write_config(remove_machine_settings(content.config), folder / CONFIG)
    atomic_write(folder / DATASET, json.dumps(content.dataset, indent=1).encode())
    arrays = {".".join(path): np.asarray(x) for path, x in flatten_arrays(content.networks).items()}
    metadata = {"format": FORMAT, "step": content.step, "hash": hash_arrays(content.networks)}
    write_state_dict(folder / WEIGHTS, arrays, metadata)


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder holds weights, and no checkpoints."""
    return (folder / WEIGHTS).exists() and not (folder / "checkpoints").exists()


def read_pretrained(folder: Path) -> Pretrained:
    """Reads a folder. Raises UserError if a file is missing, damaged, or of another project, or if
    the arrays do not fit the config."""
    file = folder / WEIGHTS
    arrays, metadata = open_safetensors(file)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{file} was not written by taming_jax, or by another version of it; "
            "`taming-jax import` lists the formats of other projects."
        )
    config = read_config(folder / CONFIG)
    try:
        dataset: Any = json.loads((folder / DATASET).read_text(encoding="utf-8"))
        paths = {tuple(name.split(".")): x for name, x in arrays.items()}
        content = Pretrained(
            config, json.loads(metadata["step"]), dataset, traverse_util.unflatten_dict(paths)
        )
        model = content.model
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} is damaged ({error}); download or copy it again.") from error
    shapes: Mapping[str, Any] = {
        ".".join((network, *path)): shape
        for network, tree in compute_shapes(model).items()
        for path, shape in flatten_shapes(tree).items()
    }
    check_state_dict(file, arrays, shapes, lambda name: False, f"the settings in {CONFIG}")
    if hash_arrays(content.networks) != metadata.get("hash"):
        raise UserError(f"{file} is damaged: its arrays differ from what was written.")
    return content
