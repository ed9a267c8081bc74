"""The official PyTorch models (CompVis/taming-transformers) as parameters of ours.

A state dict here is a mapping from the official names to numpy arrays in PyTorch's layouts.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util


def vqgan_params(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `VQGAN` from a VQModel's encoder, decoder, quantize and 1x1 convolutions."""
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, array in state_dict.items():
        if name == "quantize.embedding.weight":
            flat["quantizer", "codebook"] = np.asarray(array)
            continue
        name = re.sub(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)", r"\1_\2_\3_\4", name)
        name = re.sub(r"(down|up)\.(\d+)\.(down|up)sample", r"\1_\2_\3sample", name)
        *path, last = re.sub(r"\bmid\.", "mid_", name).split(".")
        key, value = leaf(last, array)
        flat[*path, key] = value
    return traverse_util.unflatten_dict(flat)


def discriminator_variables(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`params` and `batch_stats` of `Discriminator` from an NLayerDiscriminator's `main.*`: a
    convolution and an activation, then convolution, norm and activation a layer, then the last
    convolution."""
    flat = {}
    for name, array in state_dict.items():
        _, number, last = name.split(".")
        layer, part = divmod(int(number) + 1, 3)
        if last == "num_batches_tracked":
            continue
        if last.startswith("running_"):
            flat["batch_stats", f"norm_{layer}", last.removeprefix("running_")] = np.asarray(array)
            continue
        # 0 | 2 3 | 5 6 | … | 3n - 1: after adding one, a norm is what leaves 1 and is not the first
        kind = "norm" if part == 1 and layer > 0 else "conv"
        key, value = leaf(last, array)
        flat["params", f"{kind}_{layer}", key] = value
    return traverse_util.unflatten_dict(flat)


def gpt_params(state_dict: Mapping[str, np.ndarray], codebook_size: int) -> dict[str, Any]:
    """Parameters of `GPT` (learned positions, LayerNorm, gelu) from a mingpt GPT. Its vocabulary
    holds the codes and, where it is conditional, the classes after them; "none", which it does not
    know, gets a row of zeros."""
    names = {
        "ln1": "norm1", "ln2": "norm2", "attn.proj": "projection", "mlp.0": "mlp_in",
        "mlp.2": "mlp_out",
    }  # fmt: skip
    embedding = np.asarray(state_dict["tok_emb.weight"])
    flat: dict[tuple[str, ...], np.ndarray] = {
        ("embedding",): np.concatenate([embedding, np.zeros_like(embedding[:1])]),
        ("positions",): np.asarray(state_dict["pos_emb"])[0],
        ("head",): np.asarray(state_dict["head.weight"])[:codebook_size].T,
        ("norm_out", "scale"): np.asarray(state_dict["ln_f.weight"]),
        ("norm_out", "bias"): np.asarray(state_dict["ln_f.bias"]),
    }
    for name, array in state_dict.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            number, part, last = match.groups()
            if part in names:  # the other entries are causal masks
                key, value = leaf(last, array)
                flat[f"block_{number}", names[part], key] = value
            elif part == "attn.query":
                stacked = [
                    leaf(last, state_dict[f"blocks.{number}.attn.{each}.{last}"])
                    for each in ("query", "key", "value")
                ]
                flat[f"block_{number}", "qkv", stacked[0][0]] = np.concatenate(
                    [array for _, array in stacked], -1
                )
    return traverse_util.unflatten_dict(flat)


def leaf(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A `weight` or `bias` under Flax's name and in its layout (OIHW to HWIO, OI to IO)."""
    array = np.asarray(array)
    if name == "bias":
        return "bias", array
    if array.ndim == 4:
        return "kernel", array.transpose(2, 3, 1, 0)
    if array.ndim == 2:
        return "kernel", array.T
    return "scale", array
