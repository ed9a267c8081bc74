"""Runs of weights from elsewhere."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from taming_jax.config.load import write_config
from taming_jax.config.schema import Config
from taming_jax.config.validation import validated
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.files import check_writable
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.vqgan import build_vqgan
from taming_jax.priors.registry import build_prior
from taming_jax.progress import Progress
from taming_jax.training.checkpoints import Store
from taming_jax.weights.layout import Layout, expected, ours, paths
from taming_jax.weights.state_dict import StateDict, check

WARMUP = 200  # steps in which new optimizers get to know weights that are trained

# A function from the paths of a network's arrays to their layout in a file, and the prefix of the
# network's names there; by the names of networks.
Tables = Mapping[str, tuple[Callable[..., Layout], str]]


class Model(NamedTuple):
    """Another program's model as a run: the config, the names of the prior's classes (empty without
    a prior), and whether there is a discriminator."""

    config: Config
    class_names: tuple[str, ...]
    discriminator: bool = False


class Part(NamedTuple):
    """A file with some networks of a model. `others` says which arrays may be there besides,
    `described` what describes the file, for messages."""

    file: Path
    state_dict: StateDict
    tables: Tables
    others: Callable[[str], bool]
    described: str


def import_run(folder: Path, model: Model, parts: Sequence[Part], source: object) -> None:
    """Writes a run from the files of a model and prints what it holds; `source` says where it comes
    from. Raises UserError where a file does not match the model."""
    model = fitted(model)
    shapes = shapes_of(model)
    networks: dict[str, Any] = {}
    for part in parts:
        networks |= read_networks(part, shapes)
    write_run(folder, model, networks)
    config, classes = model.config, len(model.class_names)
    words = [f"images of {config.data.image_size} px", f"{config.vqgan.codebook_size} codes"]
    if classes:
        words.append(f"{classes} class{'es' * (classes > 1)}")
    print(f"{folder} holds {' and '.join(networks)} of {source}: {', '.join(words)}.")


def fitted(model: Model) -> Model:
    """The model with settings that training can continue with: new optimizers warm up, and a
    discriminator that the file holds is on from the first step. Losses that do not fit small images
    are off. Raises UserError for settings that cannot work."""
    size, vqgan, prior = model.config.data.image_size, model.config.vqgan, model.config.prior
    vqgan = dataclasses.replace(vqgan, warmup_steps=max(vqgan.warmup_steps, WARMUP))
    if prior.schedule == "cosine":  # one cycle has its own warm-up
        prior = dataclasses.replace(prior, warmup_steps=max(prior.warmup_steps, WARMUP))
    if model.discriminator:
        vqgan = dataclasses.replace(vqgan, discriminator_start=0.0)
    elif size < 3 * 2**vqgan.discriminator_layers:
        say(f"Images of {size} px are too small for a discriminator: training will not use one.")
        vqgan = dataclasses.replace(vqgan, discriminator_start=1.0)
    if size < 16:
        vqgan = dataclasses.replace(vqgan, perceptual_weight=0.0)
    config = dataclasses.replace(model.config, vqgan=vqgan, prior=prior)
    return model._replace(config=validated(config))


def shapes_of(model: Model) -> dict[str, Any]:
    """The shapes of what a run of a model learns, by the names of its networks."""
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


def expected_arrays(tables: Tables, shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the networks of `tables` have in a file."""
    return {
        prefix + name: shape
        for network, (table, prefix) in tables.items()
        for name, shape in expected(table(paths(shapes[network])), paths(shapes[network])).items()
    }


def read_networks(part: Part, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a file's networks, in float32, behind a progress bar; those that are not
    finite are named. UserError where the file is not as it is described."""
    known = expected_arrays(part.tables, shapes)
    check(part.file, part.state_dict, known, part.others, part.described)
    size = sum(int(np.prod(shape)) for shape in known.values()) * 4
    with Progress("converting", size, "B") as progress:

        def converted(path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
            name = ".".join(map(str, path))
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(f"{part.file} holds {array.dtype} for {name}, and not floats.")
            with np.errstate(over="ignore"):
                array = array.astype(np.float32, copy=False)
            if not np.isfinite(array).all():
                say(f"Warning: {name} holds values that are not finite.")
            progress.update(array.size * 4)
            return array

        networks = {}
        for name, (table, prefix) in part.tables.items():
            below = {
                key.removeprefix(prefix): x for key, x in part.state_dict.items()
                if key.startswith(prefix)
            }  # fmt: skip
            params = ours(table(paths(shapes[name])), below)
            networks[name] = traverse_util.path_aware_map(converted, params)
        return networks


def write_run(folder: Path, model: Model, networks: Mapping[str, Any]) -> None:
    """Writes a run that has trained nothing yet: a checkpoint of stage 1, and of stage 2 where
    there is a transformer, of weights only.

    Raises UserError where the folder holds a run, RunFailed where the disk does not take it.
    """
    generator, discriminator = {"params": networks["generator"]}, networks.get("discriminator")
    stages: dict[str, Any] = {"vqgan": {"generator": generator}}
    if discriminator is not None:
        stages["vqgan"]["discriminator"] = {
            "params": discriminator["params"],
            "extra": {"batch_stats": discriminator["batch_stats"]},
        }
    if "transformer" in networks:
        transformer = {"params": networks["transformer"]}
        stages["prior"] = {"generator": generator, "transformer": transformer}
    with new_run(folder) as place:
        for name, nets in stages.items():
            dataset = {"class_names": list(model.class_names)} if name == "prior" else None
            store = Store(place, name, dataset=dataset)
            state = {"step": np.zeros((), np.int32), "skipped": np.zeros((), np.int32)}
            store.save(0, state | {"nets": nets}, model.config, None, weights_only=True)
            store.require(0)
        write_config(model.config, place / "config.json")


def check_new(folder: Path) -> None:
    """UserError where something is in a folder already, or it cannot be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; name another --workdir.")
    parent = next(place for place in folder.absolute().parents if place.exists())
    check_writable("--workdir", parent)


@contextlib.contextmanager
def new_run(folder: Path) -> Iterator[Path]:
    """A folder beside a run's, which becomes it when all is written, and else is gone again."""
    check_new(folder)
    folder = folder.absolute()
    place = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(place, ignore_errors=True)  # of an import that was killed
        place.mkdir(parents=True)
        yield place
        place.replace(folder)
    except OSError as error:
        raise RunFailed(
            f"{error.filename or folder} could not be written ({error.strerror or error})."
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
