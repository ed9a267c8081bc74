"""Writes docs/settings.md from the dataclasses: `python -m tests.settings_page`."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

from taming_jax.config import schema

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = """\
# All settings

This page is generated from `taming_jax/config/schema.py` by `python -m tests.settings_page`.

Write a setting as a flag, `--vqgan.batch-size 64`, or as a key of a run's `config.json`. The
defaults below are those of the dataclasses; a preset replaces many of them, and
`python train_vqgan.py --config NAME --help` shows the defaults of a preset. When you
resume a run, you may change the settings marked *free*. All others determine what is trained.
"""
SECTIONS = {
    "Run": ("", (schema.Config,)),
    "Data": ("data.", (schema.DataConfig,)),
    "Stage 1": ("vqgan.", (schema.StageConfig, schema.VQGANConfig)),
    "Stage 2": ("prior.", (schema.StageConfig, schema.PriorConfig)),
}


def field_texts(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, by the names of the fields."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            texts[field.target.id] = " ".join(below.value.value.split()) if is_text else ""
    return texts


def type_name(hint: typing.Any) -> str:
    """How a type is shown: the choices of a Literal, else its Python name."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    return (hint.__name__ if isinstance(hint, type) else str(hint)).replace("typing.", "")


def rows(prefix: str, kinds: tuple[type, ...]) -> list[str]:
    texts = {name: text for kind in kinds for name, text in field_texts(kind).items()}
    hints = typing.get_type_hints(kinds[-1])
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(kinds[-1]):
        if dataclasses.is_dataclass(field.default):
            continue
        flag = f"`--{prefix}{field.name.replace('_', '-')}`"
        kind = type_name(hints[field.name]).replace("|", "or")
        free = "*Free.* " if field.metadata.get("free") else ""
        text = (free + texts.get(field.name, "")).replace("|", "\\|").strip()
        lines.append(f"| {flag} | {kind} | `{field.default}` | {text} |")
    return lines


def page() -> str:
    parts = [INTRODUCTION]
    for title, (prefix, kinds) in SECTIONS.items():
        parts += [f"\n## {title}\n", *rows(prefix, kinds)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
