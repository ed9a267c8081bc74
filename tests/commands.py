"""Running the project's commands as a user does."""

import contextlib
import importlib.metadata
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]

# Has XLA compile quickly, which is most of what a small run takes.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # later versions do not start with it


def start(*arguments: object, devices: int = 1, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A command of the repository's top level, begun."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
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


def status_of(script: str, *arguments: object) -> int:
    """The exit status of a command that runs in this process."""
    own_arguments, own_handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit:
        return exit.code
    finally:
        sys.argv = own_arguments
        signal.signal(signal.SIGINT, own_handler)  # which the commands leave to the system
    raise AssertionError(f"{script} has no exit status")


def run_here(*arguments: object, draw: bool = True) -> tuple[int, str, str]:
    """A command run to its end in this process, which spares it the start of another: exit status,
    stdout, stderr. It sees the four devices of tests/conftest.py unless it names fewer. Without
    `draw` it trains without figures, which take seconds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if not draw:
            stack.enter_context(mock.patch("taming_jax.training.vqgan.VQGANStage.draw_figures"))
            stack.enter_context(mock.patch("taming_jax.training.prior.PriorStage.draw_figures"))
        status = status_of(*map(str, arguments))
    return status, out.getvalue(), err.getvalue()


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
