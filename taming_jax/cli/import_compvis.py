"""Makes a run of an official checkpoint (CompVis/taming-transformers): VQModel, GumbelVQ and
Net2NetTransformer.

    taming-jax import compvis --checkpoint last.ckpt --config model.yaml --workdir runs/it

The run is one like any other: load_run opens it, sample.py samples it, train_vqgan.py and
train_prior.py go on with it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from taming_jax.cli.arguments import parse
from taming_jax.errors import UserError

# What a state dict holds beside the networks: the perceptual loss, attention's masks, counts.
BESIDE = re.compile(r"(^|\.)loss\.|\.attn\.mask$|\.num_batches_tracked$")


@dataclass(frozen=True)
class ImportCompVis:
    checkpoint: Path
    """The model's .ckpt or .safetensors."""
    config: Path
    """The model's YAML."""
    workdir: Path
    """The new run's folder."""
    classes: int | None = None
    """How many classes there are, where the YAML does not say."""


def main() -> None:
    given = parse(ImportCompVis, __doc__)
    from taming_jax.interop.compvis import get_layouts
    from taming_jax.interop.compvis_config import parse_yaml, read_yaml
    from taming_jax.interop.imports import Part, check_new_folder, import_run
    from taming_jax.weights.state_dict import open_state_dict

    if given.classes is not None and given.classes < 1:
        raise UserError(f"--classes is {given.classes}; it must be 1 or more.")
    check_new_folder(given.workdir)
    content = read_yaml(given.config)
    state_dict, metadata = open_state_dict(given.checkpoint)
    step = metadata.get("global_step", 0)
    step = step if isinstance(step, int) and step > 0 else 0
    model = parse_yaml(content, given.config, given.classes, step)
    if model.discriminator:
        _, prefix = get_layouts(model)["discriminator"]
        model = model._replace(discriminator=any(name.startswith(prefix) for name in state_dict))
    part = Part(
        given.checkpoint, state_dict, get_layouts(model), lambda name: bool(BESIDE.search(name)),
        str(given.config),
    )  # fmt: skip
    import_run(given.workdir, model, [part], given.checkpoint)
