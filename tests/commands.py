"""Running the project's commands as a user does."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Programs compiled by one command serve the next: most of a short run's time is compilation.
CACHE = tempfile.mkdtemp(prefix="taming_jax-test-cache-")


def start(*arguments: object, devices: int = 1, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A command of the repository's top level, begun."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    script, *rest = map(str, arguments)
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *rest], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments: object, devices: int = 1, cwd: Path | None = None) -> tuple[int, str, str]:
    """A command run to its end: exit status, stdout, stderr."""
    process = start(*arguments, devices=devices, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
