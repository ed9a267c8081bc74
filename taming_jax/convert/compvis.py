"""The official PyTorch models (CompVis/taming-transformers): where the arrays of ours stand in
their state dicts."""

import re
from collections.abc import Iterable

import numpy as np

from taming_jax.convert.layout import Entry, Layout, Path, joined, kernel, parameter, same


def vqgan_layout(paths: Iterable[Path]) -> Layout:
    """Of `VQGAN`'s parameters in a VQModel or GumbelVQ."""

    def entry(path: Path) -> Entry:
        *names, last = path
        if path == ("quantizer", "codebook"):
            # The Gumbel quantizer calls its table otherwise, and alone has a projection.
            return same("quantize.embed.weight" if gumbel else "quantize.embedding.weight")
        name = ".".join(names).replace("quantizer.", "quantize.")
        name = re.sub(r"(down|up)_(\d+)_(block|attn)_(\d+)", r"\1.\2.\3.\4", name)
        name = re.sub(r"(down|up)_(\d+)_(down|up)sample", r"\1.\2.\3sample", name)
        return parameter(name.replace("mid_", "mid."), last)

    paths = list(paths)
    gumbel = ("quantizer", "proj", "kernel") in paths
    return {path: entry(path) for path in paths}


def discriminator_layout(paths: Iterable[Path]) -> Layout:
    """Of `Discriminator`'s `params` and `batch_stats` in an NLayerDiscriminator, whose `main` is a
    convolution and an activation, then convolution, norm and activation a layer, then the last
    convolution."""

    def entry(path: Path) -> Entry:
        _, layer, last = path
        kind, number = layer.split("_")
        place = max(3 * int(number) - (kind == "conv"), 0)
        return parameter(f"main.{place}", last)

    return {path: entry(path) for path in paths}


def gpt_layout(paths: Iterable[Path]) -> Layout:
    """Of `GPT`'s parameters (learned positions, LayerNorm, gelu) in a mingpt GPT. Its tokens are
    codes and classes; our last, "none", which it does not know, is zeros."""
    names = {
        "norm1": "ln1", "norm2": "ln2", "projection": "attn.proj", "mlp_in": "mlp.0",
        "mlp_out": "mlp.2",
    }  # fmt: skip

    def entry(path: Path) -> Entry:
        if len(path) == 1:
            return whole[path[0]]
        layer, *part, last = path
        if layer == "norm_out":
            return parameter("ln_f", last)
        block = f"blocks.{layer.removeprefix('block_')}"
        if part == ["qkv"]:
            each = ("query", "key", "value")
            return joined(parameter(f"{block}.attn.{name}", last) for name in each)
        return parameter(f"{block}.{names[part[0]]}", last)

    whole = {
        "embedding": Entry(
            ("tok_emb.weight",),
            lambda x: np.concatenate([x, np.zeros_like(x[:1])]),
            lambda x: (x[:-1],),
        ),
        "positions": Entry(("pos_emb",), lambda x: x[0], lambda x: (x[None],)),
        "head": kernel("head.weight"),
    }
    return {path: entry(path) for path in paths}
