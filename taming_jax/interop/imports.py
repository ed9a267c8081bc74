"""Runs of weights from elsewhere."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from taming_jax.config.load import validated, write_config
from taming_jax.config.schema import Config
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.files import check_writable
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.vqgan import build_vqgan
from taming_jax.priors.autoregressive import GPT
from taming_jax.progress import Progress
from taming_jax.training.checkpoints import Store
from taming_jax.weights.layout import Layout, expected, ours, paths
from taming_jax.weights.state_dict import StateDict, check


class Network(NamedTuple):
    """One of a run's networks in a file: where its arrays stand there, below a prefix."""

    layout: Layout
    shapes: dict[tuple[str, ...], tuple[int, ...]]
    prefix: str

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes the file must have."""
        return {
            self.prefix + name: shape for name, shape in expected(self.layout, self.shapes).items()
        }

    def read(self, state_dict: StateDict) -> dict[str, Any]:
        """Its parameters."""
        size = len(self.prefix)
        below = {k[size:]: x for k, x in state_dict.items() if k.startswith(self.prefix)}
        return ours(self.layout, below)


def network(table: Callable[..., Layout], shapes: Any, prefix: str) -> Network:
    """A network whose arrays have such shapes, by the table of one program."""
    known = paths(shapes)
    return Network(table(known), known, prefix)


def fitted(config: Config, judged: bool) -> Config:
    """The settings of a file that holds a discriminator, which then is on from the first step, or
    does not: then of one that images so small have room for. A perceptual loss needs some, too.
    UserError where they cannot be."""
    size, vqgan = config.data.image_size, config.vqgan
    vqgan = dataclasses.replace(vqgan, discriminator_start_step=None)
    if judged:
        vqgan = dataclasses.replace(vqgan, discriminator_start=0.0)
    else:
        layers = min(vqgan.discriminator_layers, (size // 3).bit_length() - 1)
        vqgan = dataclasses.replace(
            vqgan, discriminator_layers=max(layers, 1),
            discriminator_start=vqgan.discriminator_start if layers > 0 else 1.0,
            perceptual_weight=vqgan.perceptual_weight if size >= 16 else 0.0,
        )  # fmt: skip
    return validated(dataclasses.replace(config, vqgan=vqgan))


def shapes_of(config: Config, classes: int, discriminator: bool) -> dict[str, Any]:
    """The shapes of what a run of these settings learns, by the names of its networks."""
    data, settings = config.data, config.vqgan
    image = jnp.zeros((1, data.image_size, data.image_size, data.channels))
    key = jax.random.key(0)
    generator = jax.eval_shape(build_vqgan(config).init, key, image)["params"]
    found = {"generator": generator}
    if discriminator:
        net = Discriminator(settings.discriminator_filters, settings.discriminator_layers)
        found["discriminator"] = dict(jax.eval_shape(lambda: net.init(key, image, train=False)))
    if classes:
        tokens = jnp.zeros((1, 1), jnp.int32)
        found["transformer"] = jax.eval_shape(GPT.build(config, classes).init, key, tokens)[
            "params"
        ]
    return found


def read_networks(
    file: Path,
    state_dict: StateDict,
    networks: Mapping[str, Network],
    may_be: Callable[[str], bool],
    described: str,
) -> dict[str, Any]:
    """The networks' parameters, in float32, behind a progress bar; those that are not finite are
    named. UserError where the file is not as `described`."""
    known = {k: shape for network in networks.values() for k, shape in network.expected.items()}
    check(file, state_dict, known, may_be, described)
    size = sum(int(np.prod(shape)) for shape in known.values()) * 4
    with Progress("reading", size, "B") as progress:

        def converted(path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
            name = ".".join(map(str, path))
            if array.dtype.kind != "f":
                raise UserError(f"{file} holds {array.dtype} for {name}, and not floats.")
            with np.errstate(over="ignore"):
                array = array.astype(np.float32, copy=False)
            if not np.isfinite(array).all():
                say(f"Warning: {name} holds values that are not finite.")
            progress.update(array.size * 4)
            return array

        return {
            name: traverse_util.path_aware_map(converted, network.read(state_dict))
            for name, network in networks.items()
        }


def write_run(
    folder: Path,
    config: Config,
    networks: Mapping[str, Any],
    class_names: tuple[str, ...],
) -> None:
    """Writes a run that has trained nothing yet: a checkpoint of stage 1, and of stage 2 where
    there is a transformer, of weights only.

    Raises UserError where the folder holds a run, RunFailed where the disk does not take it.
    """
    generator, discriminator = networks["generator"], networks.get("discriminator")
    stages: dict[str, Any] = {"vqgan": {"generator": {"params": generator}}}
    if discriminator is not None:
        stages["vqgan"]["discriminator"] = {
            "params": discriminator["params"],
            "extra": {"batch_stats": discriminator["batch_stats"]},
        }
    if "transformer" in networks:
        stages["prior"] = {
            "generator": {"params": generator},
            "transformer": {"params": networks["transformer"]},
        }
    with new_run(folder) as place:
        for name, nets in stages.items():
            dataset = {"class_names": list(class_names)} if name == "prior" else None
            store = Store(place, name, dataset=dataset)
            state = {"step": np.zeros((), np.int32), "skipped": np.zeros((), np.int32)}
            store.save(0, state | {"nets": nets}, config, None, weights_only=True)
            store.require(0)
        write_config(config, place / "config.json")


def summary(
    folder: Path, config: Config, networks: Mapping[str, Any], classes: int, of: object
) -> str:
    """What was written, as a sentence."""
    words = [f"images of {config.data.image_size} px", f"{config.vqgan.codes} codes"]
    if classes:
        words.append(f"{classes} class{'es' * (classes > 1)}")
    return f"{folder} holds {' and '.join(networks)} of {of}: {', '.join(words)}."


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
