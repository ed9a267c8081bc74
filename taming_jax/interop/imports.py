"""Imports the weights of another program as a run."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from taming_jax.config.load import write_config
from taming_jax.config.validation import validate_config
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.pretrained import Model, compute_shapes
from taming_jax.progress import Progress
from taming_jax.storage import check_writable
from taming_jax.training.checkpoints import Store
from taming_jax.weights.layout import Layout, convert_shapes, convert_to_flax, flatten_shapes
from taming_jax.weights.state_dict import StateDict, check_state_dict

WARMUP = 200  # steps, so that the new optimizers do not disturb the trained weights

# For each network: a function that returns the layout of its arrays in a file, given their paths,
# and the prefix of their names in the file.
Layouts = Mapping[str, tuple[Callable[..., Layout], str]]


class Part(NamedTuple):
    """A file with some networks of a model. `is_extra` returns whether the file may also contain an
    array of a given name. Messages use `source` to name the origin of the layouts."""

    file: Path
    state_dict: StateDict
    layouts: Layouts
    is_extra: Callable[[str], bool]
    source: str


def import_run(folder: Path, model: Model, parts: Sequence[Part], source: object) -> None:
    """Writes a run from the files of a model, and prints a summary, in which `source` names the
    origin of the model. Raises UserError if a file does not match the model."""
    model = prepare_for_training(model)
    shapes = compute_shapes(model)
    networks: dict[str, Any] = {}
    for part in parts:
        networks |= read_networks(part, shapes)
    write_run(folder, model, networks)
    config, classes = model.config, len(model.class_names)
    sizes = [f"images of {config.data.image_size} px", f"{config.vqgan.codebook_size} codes"]
    if classes:
        sizes.append(f"{classes} class{'es' * (classes > 1)}")
    print(
        f"{folder} contains these networks of {source}: {', '.join(networks)}; {', '.join(sizes)}."
    )


def prepare_for_training(model: Model) -> Model:
    """Returns the model with settings that suit further training.

    The learning rate warms up. A discriminator from the file is on from the first step. If the file
    has none and the images are too small for one, training does not use a discriminator. The
    perceptual loss is off if the images are too small for it. Raises UserError for invalid
    settings."""
    size, vqgan, prior = model.config.data.image_size, model.config.vqgan, model.config.prior
    vqgan = dataclasses.replace(
        vqgan, warmup_steps=max(vqgan.warmup_steps, WARMUP), discriminator_start_step=None
    )
    if prior.schedule == "cosine":  # the one-cycle schedule has its own warm-up
        prior = dataclasses.replace(prior, warmup_steps=max(prior.warmup_steps, WARMUP))
    if model.discriminator:
        vqgan = dataclasses.replace(vqgan, discriminator_start=0.0)
    elif size < 3 * 2**vqgan.discriminator_layers:
        say(f"Images of {size} px are too small for a discriminator: training will not use one.")
        vqgan = dataclasses.replace(vqgan, discriminator_start=1.0)
    if size < 16:
        vqgan = dataclasses.replace(vqgan, perceptual_weight=0.0)
    config = dataclasses.replace(model.config, vqgan=vqgan, prior=prior)
    return model._replace(config=validate_config(config))


def get_file_shapes(layouts: Layouts, shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all arrays of the networks in `layouts`, by their names in the file."""
    file_shapes = {}
    for network, (build_layout, prefix) in layouts.items():
        flat = flatten_shapes(shapes[network])
        for name, shape in convert_shapes(build_layout(flat), flat).items():
            file_shapes[prefix + name] = shape
    return file_shapes


def read_networks(part: Part, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a file's networks in float32: one tree per network.

    Warns about values that are not finite. Raises UserError if the file does not match its layouts,
    or if an array does not contain floats.
    """
    file_shapes = get_file_shapes(part.layouts, shapes)
    check_state_dict(part.file, part.state_dict, file_shapes, part.is_extra, part.source)
    size = sum(int(np.prod(shape)) for shape in file_shapes.values()) * 4
    with Progress("converting", size, "B") as progress:

        def convert_to_float32(path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
            name = ".".join(map(str, path))
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(
                    f"{part.file} has {array.dtype} values in {name}, which must be floats; name "
                    "a checkpoint whose weights are floats."
                )
            with np.errstate(over="ignore"):
                array = array.astype(np.float32, copy=False)
            if not np.isfinite(array).all():
                say(f"Warning: {name} contains values that are not finite.")
            progress.update(array.size * 4)
            return array

        networks = {}
        for network, (build_layout, prefix) in part.layouts.items():
            state_dict = {
                key.removeprefix(prefix): x for key, x in part.state_dict.items()
                if key.startswith(prefix)
            }  # fmt: skip
            params = convert_to_flax(build_layout(flatten_shapes(shapes[network])), state_dict)
            networks[network] = traverse_util.path_aware_map(convert_to_float32, params)
        return networks


def write_run(
    folder: Path, model: Model, networks: Mapping[str, Any], dataset: dict[str, Any] | None = None
) -> None:
    """Writes a run at step 0: a checkpoint of stage 1, and one of stage 2 if the model has a
    transformer. The checkpoints contain weights only. `dataset` is the fingerprint of the training
    data, if it is known.

    Raises UserError if the folder is not empty, and RunFailed if it cannot be written.
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
        stages["prior"] = {"transformer": transformer}
    with create_run(folder) as partial:
        for name, nets in stages.items():
            known = dataset
            if dataset is None and name == "prior":
                known = {"class_names": list(model.class_names)}
            frozen = {"generator": networks["generator"]} if name == "prior" else None
            store = Store(partial, name, dataset=known, frozen=frozen)
            state = {"step": np.zeros((), np.int32), "skipped": np.zeros((), np.int32)}
            store.save(0, state | {"nets": nets}, model.config, None, weights_only=True)
            store.require(0)
        write_config(model.config, partial / "config.json")


def check_new_folder(folder: Path) -> None:
    """Raises UserError if a path exists and is not an empty folder, or cannot be created."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name another one.")
    parent = next(path for path in folder.absolute().parents if path.exists())
    check_writable("the folder", parent)


@contextlib.contextmanager
def create_run(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `folder`, which becomes `folder` at the end, or is removed
    if something fails. Raises UserError and RunFailed like `write_run`."""
    check_new_folder(folder)
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by an import that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except OSError as error:
        raise RunFailed(
            f"{error.filename or folder} could not be written ({error.strerror or error})."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
