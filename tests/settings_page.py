"""Writes docs/settings.md from the dataclasses. Run it as `python -m tests.settings_page`."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

from taming_jax.config import schema
from taming_jax.config.priors import PRIOR_CONFIGS
from taming_jax.config.quantizers import QUANTIZER_CONFIGS

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = """\
# All settings

This page is generated from the dataclasses in `taming_jax/config` by `python -m
tests.settings_page`.

Write a setting as a flag, `--vqgan.batch-size 64`, or as a key of a run's `config.json`. The
defaults below are those of the dataclasses; a preset replaces many of them, and `python
train_vqgan.py --config NAME --help` shows the defaults of a preset. When you resume a run, you may
change the settings marked *free*, except `--vqgan.discriminator-start-step`, which is fixed when
the run is created. All others determine what is trained.
"""
SECTIONS: dict[str, tuple[str, type]] = {
    "Run": ("", schema.Config),
    "Data": ("data.", schema.DataConfig),
    "Stage 1": ("vqgan.", schema.VQGANConfig),
    **{
        f"Quantizer {name} of stage 1": (f"vqgan.{name}.", kind)
        for name, kind in QUANTIZER_CONFIGS.items()
    },
    "Stage 2": ("prior.", schema.PriorConfig),
    **{
        f"Prior {name} of stage 2": (f"prior.{name}.", kind)
        for name, kind in PRIOR_CONFIGS.items()
        if dataclasses.fields(kind)
    },
}


def read_help_texts(dataclass_type: type) -> dict[str, str]:
    """Returns the help texts of a dataclass and its bases, by the names of the fields. The text of
    a field is the string below it."""
    texts = {}
    for kind in filter(dataclasses.is_dataclass, reversed(dataclass_type.__mro__)):
        (definition,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, [*definition.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                texts[field.target.id] = " ".join(below.value.value.split()) if is_text else ""
    return texts


def format_type(hint: typing.Any) -> str:
    """Returns the choices of a Literal, or the Python name of another type."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    return (hint.__name__ if isinstance(hint, type) else str(hint)).replace("typing.", "")


def build_table(prefix: str, dataclass_type: type) -> list[str]:
    texts, hints = read_help_texts(dataclass_type), typing.get_type_hints(dataclass_type)
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(dataclass_type):
        if dataclasses.is_dataclass(field.default):
            continue
        flag = f"`--{prefix}{field.name.replace('_', '-')}`"
        kind = format_type(hints[field.name]).replace("|", "or")
        free = "*Free.* " if field.metadata.get("free") else ""
        text = (free + texts.get(field.name, "")).replace("|", "\\|").strip()
        lines.append(f"| {flag} | {kind} | `{field.default}` | {text} |")
    return lines


def build_page() -> str:
    parts = [INTRODUCTION]
    for title, (prefix, kind) in SECTIONS.items():
        parts += [f"\n## {title}\n", *build_table(prefix, kind)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(build_page(), encoding="utf-8")
