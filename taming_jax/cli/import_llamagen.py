"""Makes a run of LlamaGen's tokenizer (VQ-16, VQ-8) and, where it is given, of its
class-conditional transformer.

    taming-jax import llamagen --tokenizer vq_ds16_c2i.pt --gpt c2i_B_256.pt --workdir runs/b

The run is one like any other: load_run opens it, sample.py samples it, train_vqgan.py and
train_prior.py go on with it.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from taming_jax.errors import UserError

# What the state dicts hold beside the networks: recently used codes, rotary frequencies.
BESIDE = {"quantize.codebook_used", "freqs_cis"}


@dataclass(frozen=True)
class Arguments:
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
    import tyro

    work(tyro.cli(Arguments, description=__doc__))


def work(given: Arguments) -> None:
    from taming_jax.interop import imports, llamagen
    from taming_jax.weights.state_dict import open_state_dict

    for name in ("image_size", "heads"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more.")
    imports.check_new(given.workdir)
    of_tokenizer, _ = open_state_dict(given.tokenizer)
    vqgan, channels = llamagen.tokenizer_of(given.tokenizer, of_tokenizer)
    codes, prior, classes, of_gpt = vqgan.codebook_size, None, 0, None
    if given.gpt is not None:
        of_gpt, _ = open_state_dict(given.gpt)
        prior, classes = llamagen.transformer_of(given.gpt, of_gpt, codes, given.heads)
    config = llamagen.config_of(given.tokenizer.stem, vqgan, prior, given.image_size, channels)
    config = imports.fitted(config, judged=False)
    shapes = imports.shapes_of(config, classes, discriminator=False)
    generator = imports.network(llamagen.tokenizer_layout, shapes["generator"], "")
    networks = imports.read_networks(
        given.tokenizer, of_tokenizer, {"generator": generator}, BESIDE.__contains__,
        "its own codebook and levels",
    )  # fmt: skip
    if given.gpt is not None and of_gpt is not None and prior is not None:
        of_heads = functools.partial(llamagen.transformer_layout, heads=prior.heads, codes=codes)
        transformer = imports.network(of_heads, shapes["transformer"], "")
        networks |= imports.read_networks(
            given.gpt, of_gpt, {"transformer": transformer}, BESIDE.__contains__,
            "its own width and layers",
        )  # fmt: skip
    names = tuple(map(str, range(classes)))
    imports.write_run(given.workdir, config, networks, names)
    print(imports.summary(given.workdir, config, networks, classes, "LlamaGen's"))
