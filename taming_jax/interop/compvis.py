"""The official PyTorch models (CompVis/taming-transformers): where the arrays of ours stand in
their state dicts."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from taming_jax.interop.imports import Model, Tables
from taming_jax.models.lpips import GROUPS, SCALE, SHIFT
from taming_jax.weights.layout import Entry, Layout, Path, joined, kernel, parameter, same


def tables_of(model: Model) -> Tables:
    """Where the networks of a VQModel, GumbelVQ or Net2NetTransformer stand in its file."""
    below = "first_stage_model." if model.class_names else ""
    tables: dict[str, Any] = {"generator": (vqgan_layout, below)}
    if model.discriminator:
        tables["discriminator"] = discriminator_layout, f"{below}loss.discriminator."
    if model.class_names:
        tables["transformer"] = gpt_layout, "transformer."
    return tables


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


def lpips_state_dict(params: Any) -> dict[str, np.ndarray]:
    """The official names of LPIPS's weights, which its losses carry; `params` is what
    `models.lpips.load_lpips` returns."""
    channel = (1, 3, 1, 1)
    found = {
        "scaling_layer.shift": np.array(SHIFT, np.float32).reshape(channel),
        "scaling_layer.scale": np.array(SCALE, np.float32).reshape(channel),
    }
    place = number = 0  # in torchvision's VGG16, which counts activations and poolings too
    for piece, group in enumerate(GROUPS, 1):
        place += piece > 1
        for _ in group:
            layer, name = params["vgg"][f"Conv_{number}"], f"net.slice{piece}.{place}"
            found |= {f"{name}.weight": kernel(name).theirs(np.asarray(layer["kernel"]))[0]}
            found |= {f"{name}.bias": np.asarray(layer["bias"])}
            place, number = place + 2, number + 1
    for i, head in enumerate(params["heads"]):
        found[f"lin{i}.model.1.weight"] = np.asarray(head).reshape(1, -1, 1, 1)
    return found
