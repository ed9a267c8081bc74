"""A short version of tests/torture.py. Run a long one if you change what a run stores."""

import re
import subprocess
import sys

import pytest

from tests import commands


@pytest.mark.slow
def test_twelve_faults_lose_nothing(tmp_path):
    done = subprocess.run(
        [
            sys.executable, str(commands.ROOT / "tests" / "torture.py"), "--faults", "12", "--seed",
            "7", "--folder", str(tmp_path / "ordeal"),
        ],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 faults with seed 7" in done.stdout and "Nothing was lost" in done.stdout
    assert len(re.findall(r"^ +\d+ of \d+ ", done.stdout, re.M)) == 12
