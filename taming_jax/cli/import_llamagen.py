"""Imports LlamaGen's tokenizer (VQ-16 or VQ-8) and, optionally, its class-conditional transformer
as a run.

    taming-jax import llamagen --tokenizer vq_ds16_c2i.pt --gpt c2i_B_256.pt --workdir runs/llamagen

The result is an ordinary run: load it with load_run, draw samples with sample.py, and continue
training with train_vqgan.py and train_prior.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from taming_jax.cli.arguments import parse
from taming_jax.errors import UserError


@dataclass(frozen=True)
class ImportLlamaGen:
    tokenizer: Path
    """The tokenizer's .pt or .safetensors file."""
    workdir: Path
    """The new run's folder."""
    gpt: Path | None = None
    """The .pt or .safetensors file of a class-conditional transformer."""
    image_size: int = 256
    """The height and width of the images; 384 for transformers of 24x24 codes."""
    heads: int | None = None
    """The number of attention heads. Default: that of LlamaGen's model of the same width."""
    weights: Literal["ema", "model"] | None = None
    """ema: the exponential moving average of the weights; model: the weights. Default: the moving
    average if the file has one."""


def main() -> None:
    args = parse(ImportLlamaGen, __doc__)
    from taming_jax.interop import llamagen
    from taming_jax.interop.imports import check_new_folder, import_run
    from taming_jax.weights.state_dict import open_state_dict

    for name in ("image_size", "heads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more.")
    check_new_folder(args.workdir)
    tokenizer, gpt = args.tokenizer, args.gpt
    files = {"tokenizer": (tokenizer, open_state_dict(tokenizer, args.weights)[0])}
    if gpt is not None:
        files["gpt"] = gpt, open_state_dict(gpt, args.weights)[0]
    model, parts = llamagen.parse_model(files, args.image_size, args.heads)
    import_run(args.workdir, model, parts, "LlamaGen")
