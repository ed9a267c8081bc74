"""Converts between runs and the VQModel of diffusers: a folder with config.json and a file of
weights."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from taming_jax.config.schema import UNKNOWN, Config, DataConfig, VQGANConfig
from taming_jax.errors import UserError, say
from taming_jax.hub import PREFIX, download
from taming_jax.interop.imports import Model, Part, check_new_folder, create_run
from taming_jax.models.layers import count_groups
from taming_jax.run import load_run
from taming_jax.storage import atomic_write
from taming_jax.weights import layout
from taming_jax.weights.layout import Entry, Layout, map_parameter
from taming_jax.weights.state_dict import StateDict, open_state_dict, write_state_dict

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True,
          "UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}  # fmt: skip
# The settings of VQModel that must have these values, which are its defaults.
REQUIRED = {"act_fn": "silu", "norm_type": "group"}
# The names of attention layers in files of older versions of diffusers.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def locate(source: str) -> tuple[Path, Path]:
    """Returns the config and the weights in a folder, or in hf://user/name, or in a folder there,
    as in hf://user/name/vqvae, optionally followed by @ and a revision. Raises UserError if they do
    not exist."""
    if not source.startswith(PREFIX):
        folder = Path(source)
        weights = next((file for x in WEIGHTS if (file := folder / x).exists()), None)
        if weights is None or not (folder / CONFIG).exists():
            raise UserError(
                f"{folder} holds no model of diffusers, that is {CONFIG} and {WEIGHTS[0]}."
            )
        return folder / CONFIG, weights
    path, _, revision = source.removeprefix(PREFIX).partition("@")
    parts = path.strip("/").split("/")
    if len(parts) < 2:
        raise UserError(f"{source} names no repository; use hf://user/name.")
    repository = "/".join(parts[:2]) + (f"@{revision}" if revision else "")
    prefix = "".join(f"{part}/" for part in parts[2:])
    options = [prefix + name for name in WEIGHTS]
    folder = download(repository, [prefix + CONFIG], options, "VQModel")
    return folder / prefix / CONFIG, next(x for name in options if (x := folder / name).exists())


def parse_model(source: str, image_size: int | None) -> tuple[Model, Part]:
    """Returns the model of a VQModel, and its file. `image_size` determines at which heights there
    is attention; default: the model's `sample_size`. Raises UserError if a run cannot represent
    it."""
    config_file, weights = locate(source)
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
        kind = values.get("_class_name")
        if kind != "VQModel":
            raise UserError(f"{source} is a {kind}, not a VQModel; name the folder of a VQModel.")
        config = parse_config(values, image_size)
    except UserError as error:
        raise UserError(f"{source} cannot be imported: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config_file} does not describe a VQModel ({error!r}).") from error
    state_dict = rename_old_attention(open_state_dict(weights)[0])
    layouts = {"generator": (build_vqgan_layout, "")}
    part = Part(weights, state_dict, layouts, lambda name: False, "the VQModel of diffusers")
    return Model(config, ()), part


def parse_config(values: dict[str, Any], image_size: int | None) -> Config:
    """Converts the settings of a VQModel. Raises UserError if a run cannot represent it."""
    widths, channels = values["block_out_channels"], values["in_channels"]
    down = [BLOCKS.get(x) for x in values["down_block_types"]]
    up = [BLOCKS.get(x) for x in values["up_block_types"]][::-1]
    size = image_size or values.get("sample_size", 32)
    groups, levels = values.get("norm_num_groups", 32), len(widths)
    other_groups = [x for x in widths if count_groups(x) != groups]
    problems = [
        (values.get(name, expected) != expected, f"its {name} is not {expected}")
        for name, expected in REQUIRED.items()
    ] + [
        (
            None in down + up or down != up or len(down) != levels,
            f"it has the blocks {values['down_block_types']} and {values['up_block_types']}",
        ),
        (
            channels != values["out_channels"] or channels not in (1, 3),
            f"it has {channels} input and {values['out_channels']} output channels",
        ),
        (any(x % widths[0] for x in widths), f"{widths} are not multiples of the first width"),
        (bool(other_groups), f"it normalizes {other_groups} channels in {groups} groups"),
        (
            size % 2 ** (levels - 1) != 0,
            f"{size} px cannot be halved {levels - 1} times; set --image-size",
        ),
    ]
    if reasons := [phrase for is_problem, phrase in problems if is_problem]:
        raise UserError(f"{'; '.join(reasons)}.")
    latents = values["latent_channels"]
    vqgan = VQGANConfig(
        channels=widths[0], multipliers=tuple(width // widths[0] for width in widths),
        blocks=values["layers_per_block"], latent_channels=latents,
        attention_resolutions=tuple(size // 2**i for i, has in enumerate(down) if has),
        mid_attention=values.get("mid_block_add_attention", True),
        codebook_size=values["num_vq_embeddings"],
        code_dim=values.get("vq_embed_dim") or latents,
    )  # fmt: skip
    data = DataConfig(UNKNOWN, image_size=size, channels=channels)
    return Config(config="diffusers", dtype="auto", data=data, vqgan=vqgan)


def rename_old_attention(arrays: StateDict) -> StateDict:
    """Gives the attention layers of an old file their present names."""
    pattern = re.compile(rf"(?<=attentions\.)(\d+)\.({'|'.join(OLD_NAMES)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{OLD_NAMES[m[2]]}.", k): x for k, x in arrays.items()}


def build_vqgan_layout(paths: Iterable[layout.Path]) -> Layout:
    """Builds the layout of the `VQGAN` parameters in a VQModel, whose decoder numbers its levels
    from the lowest resolution, and whose attention has dense layers."""
    paths = list(paths)
    levels = 1 + max(int(m[1]) for m in (re.match(r"down_(\d+)_", p[1]) for p in paths) if m)
    parts = {
        "block": "resnets", "attn": "attentions", "downsample": "downsamplers.0",
        "upsample": "upsamplers.0",
    }  # fmt: skip
    names = {
        "norm_out": "conv_norm_out", "mid_block_1": "mid_block.resnets.0",
        "mid_attn_1": "mid_block.attentions.0", "mid_block_2": "mid_block.resnets.1",
        "nin_shortcut": "conv_shortcut", "norm": "group_norm", "q": "to_q", "k": "to_k",
        "v": "to_v", "proj_out": "to_out.0",
    }  # fmt: skip

    def map_name(name: str) -> str:
        if match := re.fullmatch(r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", name):
            direction, level, kind, number = match.groups()
            index = int(level) if direction == "down" else levels - 1 - int(level)
            suffix = "" if number is None else f".{number}"
            return f"{direction}_blocks.{index}.{parts[kind]}{suffix}"
        return names.get(name, name)

    def map_path(path: layout.Path) -> Entry:
        if path == ("quantizer", "codebook"):
            return layout.map_unchanged("quantize.embedding.weight")
        *layers, parameter = path
        name = ".".join(map(map_name, layers))
        if parameter == "kernel" and re.search(r"\.to_(q|k|v|out\.0)$", name):
            return Entry((f"{name}.weight",), lambda x: x.T[None, None], lambda x: (x[0, 0].T,))
        return map_parameter(name, parameter)

    return {path: map_path(path) for path in paths}


def build_config(config: Config) -> dict[str, Any]:
    """Converts a run's settings to those of a VQModel. Raises UserError with the reasons if it
    cannot represent the run."""
    vqgan, data = config.vqgan, config.data
    blocks, expected = vqgan.decoder_blocks or vqgan.blocks + 1, vqgan.blocks + 1
    widths = [vqgan.channels * multiplier for multiplier in vqgan.multipliers]
    groups = {count_groups(width) for width in widths}
    problems = {
        f"has no quantizer {vqgan.quantizer}": vqgan.quantizer != "vq",
        f"needs {expected} blocks per level of the decoder (--vqgan.decoder-blocks {expected}), "
        f"but this run has {blocks}": blocks != expected,
        "has the same number of groups in all layers, but the layers of this run with "
        f"{' and '.join(map(str, sorted(set(widths))))} channels have "
        f"{' and '.join(map(str, sorted(groups)))} groups": len(groups) > 1,
    }  # fmt: skip
    if reasons := [phrase for phrase, is_problem in problems.items() if is_problem]:
        raise UserError(f"this run cannot be exported: the VQModel {'; it '.join(reasons)}.")
    attention = ["Attn" * (x in vqgan.attention_resolutions) for x in config.level_resolutions]
    return {
        "_class_name": "VQModel", "in_channels": data.channels, "out_channels": data.channels,
        "down_block_types": [f"{x}DownEncoderBlock2D" for x in attention],
        "up_block_types": [f"{x}UpDecoderBlock2D" for x in reversed(attention)],
        "block_out_channels": widths, "layers_per_block": vqgan.blocks, "act_fn": "silu",
        "latent_channels": vqgan.latent_channels, "sample_size": data.image_size,
        "num_vq_embeddings": vqgan.codebook_size, "norm_num_groups": groups.pop(),
        "vq_embed_dim": vqgan.code_dim, "norm_type": "group",
        "mid_block_add_attention": vqgan.mid_attention,
    }  # fmt: skip


def export_run(workdir: Path, folder: Path) -> int:
    """Writes the generator of a run as a folder that diffusers loads with
    `VQModel.from_pretrained`. Returns the step of the checkpoint.

    Raises UserError for a run that a VQModel cannot represent, or if the folder is not empty, and
    RunFailed if it cannot be written.
    """
    check_new_folder(folder)  # before the work
    run = load_run(workdir)
    values, params = build_config(run.config), run.params
    if run.config.vqgan.vq.l2_normalise:
        params = layout.normalize_codes(params)
        say(
            "The exported codes have unit length. Indices and reconstructions stay the same, but "
            "diffusers does not normalize latents."
        )
    arrays = layout.convert_to_torch(build_vqgan_layout(layout.flatten_shapes(params)), params)
    with create_run(folder) as partial:
        atomic_write(partial / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
        write_state_dict(partial / WEIGHTS[0], arrays, {"format": "pt"})
    return run.step
