"""The layouts of the official PyTorch models (CompVis/taming-transformers): where each of our
arrays is in their state dicts."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from taming_jax.interop.imports import Layouts, Model
from taming_jax.models.lpips import GROUPS, SCALE, SHIFT
from taming_jax.weights import layout
from taming_jax.weights.layout import Entry, Layout, Path, map_parameter


def get_layouts(model: Model) -> Layouts:
    """Returns the layouts of a VQModel, GumbelVQ or Net2NetTransformer, keyed by network."""
    prefix = "first_stage_model." if model.class_names else ""
    layouts: dict[str, Any] = {"generator": (build_vqgan_layout, prefix)}
    if model.discriminator:
        layouts["discriminator"] = build_discriminator_layout, f"{prefix}loss.discriminator."
    if model.class_names:
        layouts["transformer"] = build_gpt_layout, "transformer."
    return layouts


def build_vqgan_layout(paths: Iterable[Path]) -> Layout:
    """Builds the layout of the `VQGAN` parameters in a VQModel or GumbelVQ."""

    def map_path(path: Path) -> Entry:
        *names, parameter = path
        if path == ("quantizer", "codebook"):
            # GumbelVQ names its codebook differently. Only its quantizer has a projection.
            name = "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight"
            return layout.map_unchanged(name)
        name = ".".join(names).replace("quantizer.", "quantize.")
        name = re.sub(r"(down|up)_(\d+)_(block|attn)_(\d+)", r"\1.\2.\3.\4", name)
        name = re.sub(r"(down|up)_(\d+)_(down|up)sample", r"\1.\2.\3sample", name)
        return map_parameter(name.replace("mid_", "mid."), parameter)

    paths = list(paths)
    is_gumbel = ("quantizer", "proj", "kernel") in paths
    return {path: map_path(path) for path in paths}


def build_discriminator_layout(paths: Iterable[Path]) -> Layout:
    """Builds the layout of the `Discriminator` variables (`params` and `batch_stats`) in an
    NLayerDiscriminator. Its `main` consists of a convolution and an activation; a convolution, a
    norm and an activation per layer; and the last convolution."""

    def map_path(path: Path) -> Entry:
        _, layer, parameter = path
        kind, number = layer.split("_")
        position = max(3 * int(number) - (kind == "conv"), 0)
        return map_parameter(f"main.{position}", parameter)

    return {path: map_path(path) for path in paths}


def build_gpt_layout(paths: Iterable[Path]) -> Layout:
    """Builds the layout of the `GPT` parameters (learned positions, LayerNorm, gelu) in a mingpt
    GPT, whose tokens are codes and classes. mingpt lacks our last token, "no class": an import sets
    its embedding to zeros, and an export drops it."""
    names = {
        "norm1": "ln1", "norm2": "ln2", "projection": "attn.proj", "mlp_in": "mlp.0",
        "mlp_out": "mlp.2",
    }  # fmt: skip
    top_level = {
        "embedding": Entry(
            ("tok_emb.weight",),
            lambda x: np.concatenate([x, np.zeros_like(x[:1])]),
            lambda x: (x[:-1],),
        ),
        "positions": Entry(("pos_emb",), lambda x: x[0], lambda x: (x[None],)),
        "head": layout.map_kernel("head.weight"),
    }

    def map_path(path: Path) -> Entry:
        if len(path) == 1:
            return top_level[path[0]]
        layer, *part, parameter = path
        if layer == "norm_out":
            return map_parameter("ln_f", parameter)
        block = f"blocks.{layer.removeprefix('block_')}"
        if part == ["qkv"]:
            projections = ("query", "key", "value")
            return layout.map_concatenated(
                map_parameter(f"{block}.attn.{name}", parameter) for name in projections
            )
        return map_parameter(f"{block}.{names[part[0]]}", parameter)

    return {path: map_path(path) for path in paths}


def build_lpips_state_dict(params: Any) -> dict[str, np.ndarray]:
    """Builds the state dict of the LPIPS module in the official losses from the `params` that
    `models.lpips.load_lpips` returns."""
    per_channel = (1, 3, 1, 1)
    state_dict = {
        "scaling_layer.shift": np.array(SHIFT, np.float32).reshape(per_channel),
        "scaling_layer.scale": np.array(SCALE, np.float32).reshape(per_channel),
    }
    position = number = 0  # `position` also counts activations and poolings, as torchvision does
    for piece, group in enumerate(GROUPS, 1):
        position += piece > 1
        for _ in group:
            layer, name = params["vgg"][f"Conv_{number}"], f"net.slice{piece}.{position}"
            (weight,) = layout.map_kernel(name).to_torch(np.asarray(layer["kernel"]))
            state_dict |= {f"{name}.weight": weight, f"{name}.bias": np.asarray(layer["bias"])}
            position, number = position + 2, number + 1
    for i, head in enumerate(params["heads"]):
        state_dict[f"lin{i}.model.1.weight"] = np.asarray(head).reshape(1, -1, 1, 1)
    return state_dict
