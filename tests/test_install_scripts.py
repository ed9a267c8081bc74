"""Tests which versions of Python the installation scripts accept."""

import os
import shutil
import subprocess
import sys

import pytest

from tests import commands


@pytest.mark.parametrize("script", ["install.sh", "test.sh"])
def test_a_missing_or_old_python_is_reported(tmp_path, script):
    shutil.copytree(commands.ROOT / "scripts", tmp_path / "scripts")
    old_python = tmp_path / "python3.8"
    pretend = "import sys; sys.version_info = (3, 8, 18); exec(sys.argv[1])"
    old_python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old_python.chmod(0o755)
    for python, problem in (
        (old_python, "Python 3.8 is too old"),
        ("no-python", "no-python cannot be"),
    ):
        result = subprocess.run(
            ["bash", f"scripts/{script}"], cwd=tmp_path, text=True,
            env=os.environ | {"PYTHON": str(python)}, capture_output=True,
        )  # fmt: skip
        assert result.returncode == 2 and problem in result.stderr
        assert result.stderr.endswith(
            "taming_jax needs Python 3.11 or later. Choose it with PYTHON=python3.12 bash "
            f"scripts/{script}.\n"
        )
        assert {path.name for path in tmp_path.iterdir()} == {"scripts", "python3.8"}
