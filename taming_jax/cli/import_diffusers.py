"""Imports a VQModel of diffusers as a run.

    taming-jax import diffusers FOLDER --workdir runs/theirs
    taming-jax import diffusers hf://user/name/vqvae --workdir runs/theirs --image-size 256

The folder holds config.json and diffusion_pytorch_model.safetensors (or .bin, which is read without
PyTorch). The result is an ordinary run with stage 1.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from taming_jax.cli.arguments import parse
from taming_jax.errors import UserError


@dataclass(frozen=True)
class ImportDiffusers:
    source: tyro.conf.Positional[str]
    """A folder, or hf://user/name on the Hugging Face hub, optionally with a folder there."""
    workdir: Path
    """The new run's folder."""
    image_size: int | None = None
    """The height and width of the images. Default: sample_size in config.json."""


def main() -> None:
    args = parse(ImportDiffusers, __doc__)
    from taming_jax.interop.diffusers import parse_model
    from taming_jax.interop.imports import check_new_folder, import_run

    if args.image_size is not None and args.image_size < 1:
        raise UserError(f"--image-size is {args.image_size}; it must be 1 or more.")
    check_new_folder(args.workdir)
    model, part = parse_model(args.source, args.image_size)
    import_run(args.workdir, model, [part], args.source)
