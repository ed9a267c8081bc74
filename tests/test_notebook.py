"""The notebook, from start to end, on a small run of both stages."""

import shutil

import nbformat
import numpy as np
from nbclient import NotebookClient

from tests import commands


def test_the_walkthrough_runs(both, tmp_path, monkeypatch):
    workdir = shutil.copytree(both, tmp_path / "run")
    monkeypatch.setenv("TAMING_JAX_RUN", str(workdir))
    monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
    monkeypatch.setenv("XLA_FLAGS", commands.QUICK)
    notebook = nbformat.read(commands.ROOT / "notebooks" / "walkthrough.ipynb", as_version=4)
    done = NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    kinds = [out.output_type for cell in cells for out in cell.outputs]
    assert "error" not in kinds
    pictures = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 5
    assert np.all([cell.execution_count for cell in cells])
