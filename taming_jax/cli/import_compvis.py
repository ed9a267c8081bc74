"""Makes a run of an official checkpoint (CompVis/taming-transformers): VQModel, GumbelVQ and
Net2NetTransformer.

    taming-jax import compvis --checkpoint last.ckpt --config model.yaml --workdir runs/it

The run is one like any other: load_run opens it, sample.py samples it, train_vqgan.py and
train_prior.py go on with it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taming_jax.errors import UserError

# What a state dict holds beside the networks: the perceptual loss, attention's masks, counts.
BESIDE = re.compile(r"(^|\.)loss\.|\.attn\.mask$|\.num_batches_tracked$|(^|\.)quantize\.used$")


@dataclass(frozen=True)
class Arguments:
    checkpoint: Path
    """The model's .ckpt or .safetensors."""
    config: Path
    """The model's YAML."""
    workdir: Path
    """The new run's folder."""
    classes: int | None = None
    """How many classes there are, where the YAML does not say."""


def main() -> None:
    import tyro

    work(tyro.cli(Arguments, description=__doc__))


def work(given: Arguments) -> None:
    from taming_jax.interop import imports
    from taming_jax.interop.compvis import (
        discriminator_layout,
        gpt_layout,
        vqgan_layout,
    )
    from taming_jax.interop.compvis_config import codes_in, official, read_text
    from taming_jax.weights.state_dict import open_state_dict

    if given.classes is not None and given.classes < 1:
        raise UserError(f"--classes is {given.classes}; it must be 1 or more.")
    imports.check_new(given.workdir)
    settings = read_text(given.config)
    state_dict, metadata = open_state_dict(given.checkpoint)
    used = [np.asarray(x) for name, x in state_dict.items() if name.endswith("quantize.used")]
    try:
        codes = codes_in(used[0]) if used else None
    except ValueError as error:
        raise UserError(f"{given.checkpoint}: quantize.used holds no codes ({error}).") from error
    step = metadata.get("global_step", 0)
    step = step if isinstance(step, int) and step > 0 else 0
    model = official(settings, given.config, given.classes, codes, step)
    below, names = model.discriminator, model.class_names
    judged = below is not None and any(name.startswith(below) for name in state_dict)
    config = imports.fitted(model.config, judged)
    shapes = imports.shapes_of(config, len(names), judged)
    tables = {"generator": (vqgan_layout, model.generator)}
    if judged and below is not None:
        tables["discriminator"] = (discriminator_layout, below)
    if model.transformer:
        tables["transformer"] = (gpt_layout, model.transformer)
    networks = {
        name: imports.network(table, shapes[name], prefix)
        for name, (table, prefix) in tables.items()
    }
    read = imports.read_networks(
        given.checkpoint, state_dict, networks, lambda name: bool(BESIDE.search(name)),
        str(given.config),
    )  # fmt: skip
    imports.write_run(given.workdir, config, read, names)
    print(imports.summary(given.workdir, config, networks, len(names), given.checkpoint))
