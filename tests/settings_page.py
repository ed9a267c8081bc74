"""Writes docs/settings.md from the dataclasses. Run it as `python -m tests.settings_page`."""

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
defaults below are those of the dataclasses; a preset replaces many of them, and `python
train_vqgan.py --config NAME --help` shows the defaults of a preset. When you resume a run, you may
change the settings marked *free*, except `--vqgan.discriminator-start-step`, which is fixed when
the run is created. All others determine what is trained.
"""
SECTIONS = {
    "Run": ("", (schema.Config,)),
    "Data": ("data.", (schema.DataConfig,)),
    "Stage 1": ("vqgan.", (schema.StageConfig, schema.VQGANConfig)),
    "Stage 2": ("prior.", (schema.StageConfig, schema.PriorConfig)),
}


def read_help_texts(dataclass_type: type) -> dict[str, str]:
    """Returns the help texts of a dataclass, by the names of the fields. The text of a field is the
    string below it."""
    (definition,) = ast.parse(inspect.getsource(dataclass_type)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, next_statement in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(next_statement, ast.Expr) and isinstance(
                next_statement.value, ast.Constant
            )
            texts[field.target.id] = " ".join(next_statement.value.value.split()) if is_text else ""
    return texts


def format_type(hint: typing.Any) -> str:
    """Returns the choices of a Literal, or the Python name of another type."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    return (hint.__name__ if isinstance(hint, type) else str(hint)).replace("typing.", "")


def build_table(prefix: str, kinds: tuple[type, ...]) -> list[str]:
    texts = {name: text for kind in kinds for name, text in read_help_texts(kind).items()}
    hints = typing.get_type_hints(kinds[-1])
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(kinds[-1]):
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
    for title, (prefix, kinds) in SECTIONS.items():
        parts += [f"\n## {title}\n", *build_table(prefix, kinds)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(build_page(), encoding="utf-8")
