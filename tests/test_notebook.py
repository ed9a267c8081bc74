"""Tests that the notebook imports existing names and runs on a small run with both stages."""

import ast
import shutil

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests import commands

NOTEBOOK = commands.ROOT / "notebooks" / "walkthrough.ipynb"


def test_the_walkthrough_uses_existing_names_only():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    parsed = ast.parse("\n".join(sources).replace("%matplotlib", "# %matplotlib"))
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


@pytest.mark.slow
def test_the_walkthrough_runs_without_errors(prior_workdir, tmp_path, monkeypatch):
    workdir = shutil.copytree(prior_workdir, tmp_path / "run")
    monkeypatch.setenv("TAMING_JAX_RUN", str(workdir))
    monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
    monkeypatch.setenv("XLA_FLAGS", commands.XLA_FLAGS)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    executed = NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    kinds = [out.output_type for cell in cells for out in cell.outputs]
    assert "error" not in kinds
    pictures = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 5
    assert np.all([cell.execution_count for cell in cells])
