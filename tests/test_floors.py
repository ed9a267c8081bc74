"""Tests of the structure of the package: every module has a floor, and there are no import
cycles."""

import ast
from pathlib import Path

from tests import commands

# From the top to the bottom. A module imports only from lower floors or from its own folder.
FLOORS = (
    {"cli"}, {"sharing", "playground"}, {"evaluation"}, {"interop"},
    {"run", "sampler", "tiled_inference", "pretrained", "hub"}, {"training"}, {"metrics"},
    {"priors"}, {"models"}, {"figures"}, {"data"}, {"parallel"}, {"weights"}, {"config"},
    {"progress", "storage"}, {"losses"}, {"errors"},
)  # fmt: skip
LEVELS = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def read_imports() -> dict[str, set[str]]:
    """Returns the modules of the package that each module imports, anywhere in its code."""
    package = commands.ROOT / "taming_jax"
    files: dict[str, Path] = {}
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(commands.ROOT).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = file
    imports = {}
    for name, file in files.items():
        names: list[str] = []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports relatively"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    names.append(inner if inner in files else str(node.module))
        imports[name] = {other for other in names if other in files and other != name}
    return imports


IMPORTS = read_imports()


def get_floor(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_floor():
    assert {get_floor(module) for module in IMPORTS} - {""} == LEVELS.keys()


def test_modules_import_only_from_lower_floors_or_their_own():
    upwards = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if get_floor(module) != get_floor(other)
        and LEVELS.get(get_floor(module), -1) > LEVELS.get(get_floor(other), -1)
    ]
    assert not upwards, upwards


def test_there_are_no_import_cycles():
    visited: set[str] = set()

    def visit(module, path):
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in visited:
            for other in sorted(IMPORTS[module]):
                visit(other, [*path, module])
            visited.add(module)

    for module in IMPORTS:
        visit(module, [])
