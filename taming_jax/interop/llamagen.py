"""Reads the settings of LlamaGen's tokenizers and class-conditional transformers (arXiv 2406.06525)
from the shapes of their arrays, and builds the layouts of our arrays in their state dicts."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from taming_jax.config.quantizers import VQConfig
from taming_jax.config.schema import UNKNOWN, Config, DataConfig, PriorConfig, VQGANConfig
from taming_jax.errors import UserError
from taming_jax.interop.imports import Model, Part
from taming_jax.weights import layout
from taming_jax.weights.layout import Entry, Layout, map_parameter
from taming_jax.weights.state_dict import StateDict

# The number of attention heads of GPT-B, L, XL, XXL and 3B by width. It does not follow from the
# shapes.
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32}

# Arrays that are not parameters: the recently used codes, and the rotary frequencies.
EXTRA = {"quantize.codebook_used", "freqs_cis"}


def parse_tokenizer(file: object, state_dict: StateDict) -> tuple[VQGANConfig, int]:
    """Returns the settings of a VQ-16, a VQ-8, or a tokenizer of another size, and the number of
    image channels. Raises UserError for another model."""
    shape = functools.partial(get_shape, file, "tokenizer", state_dict)
    levels = count_indices(state_dict, r"encoder\.conv_blocks\.(\d+)\.")
    channels, image_channels, *_ = shape("encoder.conv_in.weight", 4)
    widths = [shape(f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in range(levels)]
    codebook_size, code_dim = shape("quantize.embedding.weight", 2)
    if not levels or any(width % channels for width in widths):
        raise UserError(
            f"{file} is not a LlamaGen tokenizer, which has levels whose widths are multiples of "
            f"{channels}; name a VQ-16 or VQ-8 file."
        )
    settings = VQGANConfig(
        channels=channels, multipliers=tuple(width // channels for width in widths),
        blocks=count_indices(state_dict, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        latent_channels=shape("encoder.conv_out.weight", 4)[0], codebook_size=codebook_size,
        code_dim=code_dim, vq=VQConfig(l2_normalise=True), discriminator_weight=0.5,
        learning_rate=1e-4, discriminator_learning_rate=1e-4, betas=(0.9, 0.95),
    )  # fmt: skip
    return settings, image_channels


def parse_transformer(
    file: object, state_dict: StateDict, codebook_size: int, heads: int | None
) -> tuple[PriorConfig, int]:
    """Returns the settings and the number of classes of a class-conditional transformer. Raises
    UserError for another model."""
    shape = functools.partial(get_shape, file, "class-conditional transformer", state_dict)
    classes, _ = shape("cls_embedding.embedding_table.weight", 2)
    tokens, width = shape("tok_embeddings.weight", 2)
    hidden, _ = shape("layers.0.feed_forward.w1.weight", 2)
    if tokens != codebook_size:
        raise UserError(
            f"{file} predicts {tokens} codes, but the tokenizer has {codebook_size}; name files "
            "that belong together."
        )
    heads = heads or HEADS.get(width)
    if heads is None or width % (4 * heads):
        raise UserError(
            f"{file} has width {width}; set --heads to its number of attention heads "
            "(width / heads must be a multiple of 4)."
        )
    prior = PriorConfig(
        layers=count_indices(state_dict, r"layers\.(\d+)\."), heads=heads, width=width, norm="rms",
        mlp="swiglu", mlp_width=hidden, bias=False,
        positions="llamagen", dropout=0.1, label_dropout=0.1, learning_rate=1e-4,
        weight_decay=0.05, grad_clip_norm=1.0, schedule="cosine", final_learning_rate=1.0,
        # The defaults of LlamaGen's sampling script.
        guidance_scale=4.0, top_k=min(2000, codebook_size),
    )  # fmt: skip
    # The last class embedding means "no class".
    return prior, classes - 1


def get_shape(
    file: object, kind: str, state_dict: StateDict, name: str, dimensions: int
) -> tuple[int, ...]:
    """Returns the shape of an array. Raises UserError if it is missing or has another number of
    dimensions."""
    if name not in state_dict or len(state_dict[name].shape) != dimensions:
        raise UserError(
            f"{file} is not a LlamaGen {kind}: it has no {dimensions}-dimensional array {name}; "
            f"name a LlamaGen {kind} file."
        )
    return state_dict[name].shape


def count_indices(state_dict: StateDict, pattern: str) -> int:
    """Returns 1 + the largest index that `pattern` captures in the names, or 0 if none match."""
    matches = (re.match(pattern, name) for name in state_dict)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def parse_model(
    files: dict[str, tuple[Path, StateDict]], image_size: int, heads: int | None
) -> tuple[Model, list[Part]]:
    """Returns the model in a "tokenizer" file and an optional "gpt" file, and the parts to read.

    Raises UserError if a file contains another model, or if the files do not match.
    """
    file, state_dict = files["tokenizer"]
    vqgan, channels = parse_tokenizer(file, state_dict)
    prior, classes = PriorConfig(), 0
    layouts = {"tokenizer": {"generator": (build_tokenizer_layout, "")}}
    if "gpt" in files:
        prior, classes = parse_transformer(*files["gpt"], vqgan.codebook_size, heads)
        build_layout = functools.partial(
            build_transformer_layout, heads=prior.heads, codebook_size=vqgan.codebook_size
        )
        layouts["gpt"] = {"transformer": (build_layout, "")}
    data = DataConfig(UNKNOWN, image_size=image_size, channels=channels)
    config = Config(config=file.stem, dtype="auto", data=data, vqgan=vqgan, prior=prior)
    # Attention is at the lowest resolution, which depends on the image size.
    vqgan = dataclasses.replace(vqgan, attention_resolutions=(config.grid_size,))
    model = Model(dataclasses.replace(config, vqgan=vqgan), tuple(map(str, range(classes))))
    parts = [
        Part(*files[kind], file_layouts, EXTRA.__contains__, "LlamaGen's layout")
        for kind, file_layouts in layouts.items()
    ]
    return model, parts


def build_tokenizer_layout(paths: Iterable[layout.Path]) -> Layout:
    """Builds the layout of the `VQGAN` parameters in a LlamaGen VQModel, whose decoder numbers its
    levels from the lowest resolution."""
    paths = list(paths)
    levels = 1 + max(int(m[1]) for m in (re.match(r"down_(\d+)_", p[1]) for p in paths) if m)
    middle = {"mid_block_1": "mid.0", "mid_attn_1": "mid.1", "mid_block_2": "mid.2"}

    def map_path(path: layout.Path) -> Entry:
        if path == ("quantizer", "codebook"):
            return layout.map_unchanged("quantize.embedding.weight")
        net, *names, parameter = path
        if names and names[0] in middle:
            names[0] = middle[names[0]]
        elif names and (match := re.fullmatch(r"(down|up)_(\d+)_(.+)", names[0])):
            direction, level, part = match[1], int(match[2]), match[3]
            index = level if direction == "down" else levels - 1 - level
            part = re.sub(r"block_(\d+)", r"res.\1", part).replace("attn_", "attn.")
            names[0] = f"conv_blocks.{index}.{part}"
        return map_parameter(".".join([net, *names]), parameter)

    return {path: map_path(path) for path in paths}


def build_transformer_layout(
    paths: Iterable[layout.Path], heads: int, codebook_size: int
) -> Layout:
    """Builds the layout of the `GPT` parameters (RMSNorm, SwiGLU, no biases, LlamaGen's positions)
    in a LlamaGen Transformer."""
    names = {
        "norm1": "attention_norm", "norm2": "ffn_norm", "projection": "attention.wo",
        "mlp_gate": "feed_forward.w1", "mlp_in": "feed_forward.w3", "mlp_out": "feed_forward.w2",
    }  # fmt: skip

    def map_path(path: layout.Path) -> Entry:
        if path == ("embedding",):
            return Entry(
                ("tok_embeddings.weight", "cls_embedding.embedding_table.weight"),
                lambda codes, classes: np.concatenate([codes, classes]),
                lambda x: (x[:codebook_size], x[codebook_size:]),
            )
        if path == ("head",):
            return layout.map_kernel("output.weight")
        block, *part, parameter = path
        if block == "norm_out":
            return map_parameter("norm", parameter)
        layer = f"layers.{block.removeprefix('block_')}"
        if part == ["qkv"]:
            return map_qkv(f"{layer}.attention.wqkv.weight", heads)
        return map_parameter(f"{layer}.{names[part[0]]}", parameter)

    return {path: map_path(path) for path in paths}


def map_qkv(name: str, heads: int) -> Entry:
    """Maps the projection to queries, keys and values, and reorders the channels of each head.

    LlamaGen's rotary embeddings rotate pairs of neighboring channels. Ours pair the first quarter
    of a head's channels with the second (rotated by the row), and the third with the fourth (by the
    column).
    """

    def compute_order(width: int) -> np.ndarray:
        quarter = width // heads // 4
        pairs = 2 * np.arange(quarter)
        head = np.concatenate([pairs, pairs + 1, pairs + 2 * quarter, pairs + 2 * quarter + 1])
        return (4 * quarter * np.arange(heads)[:, None] + head).reshape(-1)

    def to_flax(x: np.ndarray) -> np.ndarray:
        q, k, v = np.split(x.T, 3, -1)
        order = compute_order(q.shape[-1])
        return np.concatenate([q[:, order], k[:, order], v], -1)

    def to_torch(x: np.ndarray) -> tuple[np.ndarray, ...]:
        q, k, v = np.split(x, 3, -1)
        inverse = np.argsort(compute_order(q.shape[-1]))
        return (np.concatenate([q[:, inverse], k[:, inverse], v], -1).T,)

    return Entry((name,), to_flax, to_torch)
