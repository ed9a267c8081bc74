"""Tests that the notebooks import existing names and run from start to end."""

import ast
import re
import shutil

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests import commands

FOLDER = commands.ROOT / "notebooks"


@pytest.mark.parametrize("name", ["walkthrough", "own_pictures"])
def test_notebooks_use_existing_names_only(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    parsed = ast.parse(re.sub(r"(?m)^( *)%.*$", r"\1pass", "\n".join(sources)))
    imports = [node for node in parsed.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) > 5
    names: dict = {}
    exec("\n".join(map(ast.unparse, imports)), names)
    # The attributes that it uses of the imported modules must exist too.
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(parsed)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    used_attributes = [(name, attribute) for name, attribute in used if name in names]
    assert len(used_attributes) > 5 and all(
        hasattr(names[name], attribute) for name, attribute in used_attributes
    )


def execute(name: str, monkeypatch, **variables: object) -> list:
    """Runs a notebook with environment variables, and returns its code cells."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
    monkeypatch.setenv("XLA_FLAGS", commands.XLA_FLAGS)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    executed = NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert "error" not in [out.output_type for cell in cells for out in cell.outputs]
    assert np.all([cell.execution_count for cell in cells])
    return cells


def count_pictures(cells: list) -> int:
    outputs = [out for cell in cells for out in cell.outputs]
    return sum("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.slow
def test_the_walkthrough_runs_without_errors(prior_workdir, tmp_path, monkeypatch):
    workdir = shutil.copytree(prior_workdir, tmp_path / "run")
    assert count_pictures(execute("walkthrough", monkeypatch, TAMING_JAX_RUN=workdir)) == 5


@pytest.mark.slow
def test_own_pictures_leads_from_a_folder_to_samples(tmp_path, monkeypatch):
    cells = execute(
        "own_pictures", monkeypatch, TAMING_JAX_PICTURES=tmp_path / "pictures",
        TAMING_JAX_RUN=tmp_path / "run", TAMING_JAX_STEPS=4,
    )  # fmt: skip
    assert count_pictures(cells) == 4
    text = "".join(out.get("text", "") for cell in cells for out in cell.outputs)
    assert "training pictures of disks, squares" in text and text.rstrip().endswith("True")
    assert (tmp_path / "run" / "pretrained" / "README.md").exists()
