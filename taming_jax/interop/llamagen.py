"""LlamaGen's tokenizers and class-conditional transformers (arXiv 2406.06525): their settings, read
off the shapes of their arrays, and where the arrays of ours stand in their state dicts."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from taming_jax.config.schema import UNKNOWN, Config, DataConfig, PriorConfig, VQGANConfig
from taming_jax.errors import UserError
from taming_jax.interop.imports import Model, Part
from taming_jax.weights import layout
from taming_jax.weights.layout import Entry, Layout, parameter
from taming_jax.weights.state_dict import StateDict

# Attention heads by a transformer's width, which no shape tells: GPT-B, L, XL, XXL and 3B.
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32}

# What the state dicts hold beside the networks: recently used codes, rotary frequencies.
BESIDE = {"quantize.codebook_used", "freqs_cis"}


def tokenizer_of(file: object, state_dict: StateDict) -> tuple[VQGANConfig, int]:
    """The settings of a VQ-16 or VQ-8, or one of other sizes, and the channels of its images.
    UserError for what is none."""

    shape = functools.partial(shape_of, file, "tokenizer", state_dict)
    levels = count(state_dict, r"encoder\.conv_blocks\.(\d+)\.")
    channels, of_image, *_ = shape("encoder.conv_in.weight", 4)
    widths = [shape(f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in range(levels)]
    codes, dimension = shape("quantize.embedding.weight", 2)
    if not levels or any(width % channels for width in widths):
        raise UserError(f"{file} is no tokenizer of LlamaGen's: its levels are not its multiples.")
    settings = VQGANConfig(
        channels=channels, multipliers=tuple(width // channels for width in widths),
        blocks=count(state_dict, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        latent_channels=shape("encoder.conv_out.weight", 4)[0], codebook_size=codes,
        code_dim=dimension, l2_normalise=True, commitment=0.25, discriminator_weight=0.5,
        learning_rate=1e-4, discriminator_learning_rate=1e-4, betas=(0.9, 0.95),
    )  # fmt: skip
    return settings, of_image


def transformer_of(
    file: object, state_dict: StateDict, codes: int, heads: int | None
) -> tuple[PriorConfig, int]:
    """A class-conditional transformer's settings, and how many classes it has. UserError for what
    is none."""
    shape = functools.partial(shape_of, file, "class-conditional transformer", state_dict)
    classes, _ = shape("cls_embedding.embedding_table.weight", 2)
    rows, width = shape("tok_embeddings.weight", 2)
    hidden, _ = shape("layers.0.feed_forward.w1.weight", 2)
    if rows != codes:
        raise UserError(f"{file} speaks {rows} codes, and the tokenizer has {codes}.")
    heads = heads or HEADS.get(width)
    if heads is None or width % (4 * heads):
        raise UserError(
            f"{file} is {width} wide, and no file says how many heads that is; give their number "
            "by --heads."
        )
    prior = PriorConfig(
        layers=count(state_dict, r"layers\.(\d+)\."), heads=heads, width=width, norm="rms",
        mlp="swiglu", mlp_width=hidden, bias=False,
        positions="llamagen", dropout=0.1, label_dropout=0.1, learning_rate=1e-4,
        weight_decay=0.05, grad_clip_norm=1.0, schedule="cosine", final_learning_rate=1.0,
        # As its own script draws.
        guidance_scale=4.0, top_k=min(2000, codes),
    )  # fmt: skip
    # The last row stands for no class.
    return prior, classes - 1


def shape_of(
    file: object, kind: str, state_dict: StateDict, name: str, dimensions: int
) -> tuple[int, ...]:
    """The shape of an array of so many dimensions. UserError where there is none."""
    if name not in state_dict or len(state_dict[name].shape) != dimensions:
        raise UserError(f"{file} is no {kind} of LlamaGen's: it lacks {name}.")
    return state_dict[name].shape


def count(state_dict: StateDict, pattern: str) -> int:
    """How many of something there are, by the numbers in names."""
    found = (re.match(pattern, name) for name in state_dict)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def model_of(
    files: dict[str, tuple[Path, StateDict]], image_size: int, heads: int | None
) -> tuple[Model, list[Part]]:
    """The model in a "tokenizer" file and, where it is given, a "gpt" file, and how to read them.
    UserError where they hold none, or do not fit."""
    file, state_dict = files["tokenizer"]
    vqgan, channels = tokenizer_of(file, state_dict)
    prior, classes, tables = PriorConfig(), 0, {"tokenizer": {"generator": (tokenizer_layout, "")}}
    if "gpt" in files:
        prior, classes = transformer_of(*files["gpt"], vqgan.codebook_size, heads)
        layout = functools.partial(transformer_layout, heads=prior.heads, codes=vqgan.codebook_size)
        tables["gpt"] = {"transformer": (layout, "")}
    data = DataConfig(UNKNOWN, image_size=image_size, channels=channels)
    config = Config(config=file.stem, data=data, vqgan=vqgan, prior=prior)
    # Attention is at the lowest resolution, wherever that is.
    vqgan = dataclasses.replace(vqgan, attention_resolutions=(config.grid_size,))
    model = Model(dataclasses.replace(config, vqgan=vqgan), tuple(map(str, range(classes))))
    parts = [
        Part(*files[kind], of_file, BESIDE.__contains__, "its own shapes")
        for kind, of_file in tables.items()
    ]
    return model, parts


def tokenizer_layout(paths: Iterable[layout.Path]) -> Layout:
    """Of `VQGAN`'s parameters in a LlamaGen VQModel, whose decoder counts its levels from the
    lowest resolution."""
    known = list(paths)
    levels = 1 + max(int(m[1]) for m in (re.match(r"down_(\d+)_", p[1]) for p in known) if m)
    middle = {"mid_block_1": "mid.0", "mid_attn_1": "mid.1", "mid_block_2": "mid.2"}

    def entry(path: layout.Path) -> Entry:
        if path == ("quantizer", "codebook"):
            return layout.same("quantize.embedding.weight")
        net, *names, last = path
        if names and names[0] in middle:
            names[0] = middle[names[0]]
        elif names and (match := re.fullmatch(r"(down|up)_(\d+)_(.+)", names[0])):
            way, level, part = match[1], int(match[2]), match[3]
            place = level if way == "down" else levels - 1 - level
            part = re.sub(r"block_(\d+)", r"res.\1", part).replace("attn_", "attn.")
            names[0] = f"conv_blocks.{place}.{part}"
        return parameter(".".join([net, *names]), last)

    return {path: entry(path) for path in known}


def transformer_layout(paths: Iterable[layout.Path], heads: int, codes: int) -> Layout:
    """Of `GPT`'s parameters (RMSNorm, SwiGLU, no biases, LlamaGen's positions) in its
    Transformer."""
    names = {
        "norm1": "attention_norm", "norm2": "ffn_norm", "projection": "attention.wo",
        "mlp_gate": "feed_forward.w1", "mlp_in": "feed_forward.w3", "mlp_out": "feed_forward.w2",
    }  # fmt: skip

    def entry(path: layout.Path) -> Entry:
        if path == ("embedding",):
            tables = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight")
            return Entry(
                tables, lambda a, b: np.concatenate([a, b]), lambda x: (x[:codes], x[codes:])
            )
        if path == ("head",):
            return layout.kernel("output.weight")
        block, *part, last = path
        if block == "norm_out":
            return parameter("norm", last)
        layer = f"layers.{block.removeprefix('block_')}"
        if part == ["qkv"]:
            return attention(f"{layer}.attention.wqkv.weight", heads)
        return parameter(f"{layer}.{names[part[0]]}", last)

    return {path: entry(path) for path in paths}


def attention(name: str, heads: int) -> Entry:
    """Queries, keys and values. Rotary embeddings turn neighbouring channels of a head there, and
    here a quarter of its channels with the next: first by the row, then by the column."""

    def order(width: int) -> np.ndarray:
        quarter = width // heads // 4
        pairs = 2 * np.arange(quarter)
        of_head = np.concatenate([pairs, pairs + 1, pairs + 2 * quarter, pairs + 2 * quarter + 1])
        return (4 * quarter * np.arange(heads)[:, None] + of_head).reshape(-1)

    def ours(x: np.ndarray) -> np.ndarray:
        q, k, v = np.split(x.T, 3, -1)
        turned = order(q.shape[-1])
        return np.concatenate([q[:, turned], k[:, turned], v], -1)

    def theirs(x: np.ndarray) -> tuple[np.ndarray, ...]:
        q, k, v = np.split(x, 3, -1)
        back = np.argsort(order(q.shape[-1]))
        return (np.concatenate([q[:, back], k[:, back], v], -1).T,)

    return Entry((name,), ours, theirs)
