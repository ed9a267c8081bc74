"""Running the project's commands as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Has XLA compile quickly, which is most of what a small run takes.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def start(
    *arguments: object, devices: int = 1, cwd: Path | None = None, own_group: bool = False
) -> subprocess.Popen[str]:
    """A command of the repository's top level, begun; in its own group it can be sent signals as a
    terminal sends them."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "PYTHONPATH": str(ROOT),
    }
    script, *rest = map(str, arguments)
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *rest], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=own_group,
    )  # fmt: skip


def run(*arguments: object, devices: int = 1, cwd: Path | None = None) -> tuple[int, str, str]:
    """A command run to its end: exit status, stdout, stderr."""
    process = start(*arguments, devices=devices, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
