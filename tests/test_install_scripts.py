"""Which Python the scripts that install take."""

import os
import shutil
import subprocess
import sys

import pytest

from tests import commands


@pytest.mark.parametrize("script", ["install.sh", "test.sh"])
def test_a_python_that_is_too_old_is_a_sentence(tmp_path, script):
    shutil.copytree(commands.ROOT / "scripts", tmp_path / "scripts")
    old = tmp_path / "python3.8"
    pretend = "import sys; sys.version_info = (3, 8, 18); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    for python, problem in ((old, "Python 3.8 is too old"), ("no-python", "no-python cannot be")):
        done = subprocess.run(
            ["bash", f"scripts/{script}"], cwd=tmp_path, text=True,
            env=os.environ | {"PYTHON": str(python)}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 2 and problem in done.stderr
        assert done.stderr.endswith(
            "taming_jax needs Python 3.11 or later. Choose it with PYTHON=python3.12 bash "
            f"scripts/{script}.\n"
        )
        assert {path.name for path in tmp_path.iterdir()} == {"scripts", "python3.8"}
