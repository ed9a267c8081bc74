"""Imports an official checkpoint (CompVis/taming-transformers) as a run: VQModel, GumbelVQ or
Net2NetTransformer.

    taming-jax import compvis --checkpoint last.ckpt --config model.yaml --workdir runs/theirs

The result is an ordinary run: load it with load_run, draw samples with sample.py, and continue
training with train_vqgan.py and train_prior.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from taming_jax.cli.arguments import parse
from taming_jax.errors import UserError

# Entries of a state dict outside the networks: perceptual loss, attention masks, batch counts.
IGNORED = re.compile(r"(^|\.)loss\.|\.attn\.mask$|\.num_batches_tracked$")


@dataclass(frozen=True)
class ImportCompVis:
    checkpoint: Path
    """The model's .ckpt, .pt, .pth or .safetensors file."""
    config: Path
    """The model's YAML file."""
    workdir: Path
    """The new run's folder."""
    classes: int | None = None
    """The number of classes. Default: n_classes in the YAML, or else at most 1000."""
    weights: Literal["ema", "model"] | None = None
    """ema: the exponential moving average of the weights; model: the weights. Default: the moving
    average if the file has one."""


def main() -> None:
    args = parse(ImportCompVis, __doc__)
    from taming_jax.interop.compvis import get_layouts
    from taming_jax.interop.compvis_config import parse_yaml, read_yaml
    from taming_jax.interop.imports import Part, check_new_folder, import_run
    from taming_jax.weights.state_dict import open_state_dict

    if args.classes is not None and args.classes < 1:
        raise UserError(f"--classes is {args.classes}; it must be 1 or more.")
    check_new_folder(args.workdir)
    content = read_yaml(args.config)
    state_dict, metadata = open_state_dict(args.checkpoint, args.weights)
    step = metadata.get("global_step", 0)
    step = step if isinstance(step, int) and step > 0 else 0
    model = parse_yaml(content, args.config, args.classes, step)
    if model.discriminator:
        _, prefix = get_layouts(model)["discriminator"]
        model = model._replace(discriminator=any(name.startswith(prefix) for name in state_dict))
    part = Part(
        args.checkpoint, state_dict, get_layouts(model), lambda name: bool(IGNORED.search(name)),
        str(args.config),
    )  # fmt: skip
    import_run(args.workdir, model, [part], args.checkpoint)
