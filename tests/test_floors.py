"""The structure of the package: one floor per job, and no circles."""

import ast
from pathlib import Path

from tests import commands

# From the top down. A module imports from floors below its own only, or from its own folder.
FLOORS = (
    {"cli"}, {"evaluation"}, {"interop"}, {"run", "sampler", "tiled_inference"}, {"training"},
    {"metrics"}, {"priors"}, {"models"}, {"figures"}, {"data"}, {"parallel"}, {"weights"},
    {"config"},
    {"progress", "storage"}, {"losses"}, {"errors"},
)  # fmt: skip
LEVELS = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def read_imports() -> dict[str, set[str]]:
    """The modules of the package, each with those that it imports, wherever that stands in it."""
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


def floor_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_floor():
    assert {floor_of(module) for module in IMPORTS} - {""} == LEVELS.keys()


def test_modules_import_from_floors_below_their_own():
    upwards = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if floor_of(module) != floor_of(other)
        and LEVELS.get(floor_of(module), -1) > LEVELS.get(floor_of(other), -1)
    ]
    assert not upwards, upwards


def test_no_imports_go_round_in_circles():
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(IMPORTS[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in IMPORTS:
        visit(module, [])
