"""Makes a run of LlamaGen's tokenizer (VQ-16, VQ-8) and, where it is given, of its
class-conditional transformer.

    taming-jax import llamagen --tokenizer vq_ds16_c2i.pt --gpt c2i_B_256.pt --workdir runs/b

The run is one like any other: load_run opens it, sample.py samples it, train_vqgan.py and
train_prior.py go on with it.
"""

from dataclasses import dataclass
from pathlib import Path

from taming_jax.cli.arguments import parse
from taming_jax.errors import UserError


@dataclass(frozen=True)
class ImportLlamaGen:
    tokenizer: Path
    """The tokenizer's .pt or .safetensors."""
    workdir: Path
    """The new run's folder."""
    gpt: Path | None = None
    """A class-conditional transformer's .pt or .safetensors."""
    image_size: int = 256
    """Height and width of the images; c2i also has 384."""
    heads: int | None = None
    """Attention heads of a transformer of an unusual width."""


def main() -> None:
    given = parse(ImportLlamaGen, __doc__)
    from taming_jax.interop import llamagen
    from taming_jax.interop.imports import check_new_folder, import_run
    from taming_jax.weights.state_dict import open_state_dict

    for name in ("image_size", "heads"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more.")
    check_new_folder(given.workdir)
    tokenizer, gpt = given.tokenizer, given.gpt
    files = {"tokenizer": (tokenizer, open_state_dict(tokenizer)[0])}
    if gpt is not None:
        files["gpt"] = gpt, open_state_dict(gpt)[0]
    model, parts = llamagen.parse_model(files, given.image_size, given.heads)
    import_run(given.workdir, model, parts, "LlamaGen's")
