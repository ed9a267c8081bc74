"""Helpers that run the project's commands as a user does."""

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

# Flags for fast compilation, because a small run spends most of its time on compilation.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later versions fail with this flag


def start(*arguments: object, devices: int = 1, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Starts a command from the top level of the repository."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}",
        "PYTHONPATH": str(ROOT),
    }
    script, *rest = map(str, arguments)
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *rest], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments: object, devices: int = 1, cwd: Path | None = None) -> tuple[int, str, str]:
    """Runs a command to its end. Returns its exit status, stdout, and stderr."""
    process = start(*arguments, devices=devices, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_for_status(script: str, *arguments: object) -> int:
    """Runs a command in this process and returns its exit status."""
    previous_arguments, previous_handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit:
        return exit.code
    finally:
        sys.argv = previous_arguments
        signal.signal(signal.SIGINT, previous_handler)  # the commands reset it to the default
    raise AssertionError(f"{script} has no exit status")


def run_here(*arguments: object, draw: bool = True) -> tuple[int, str, str]:
    """Runs a command to its end in this process, which saves the time to start another process.
    Returns its exit status, stdout, and stderr. The command uses the four devices of
    tests/conftest.py by default. Without `draw`, training draws no figures, which take seconds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if not draw:
            stack.enter_context(mock.patch("taming_jax.training.vqgan.VQGANStage.draw_figures"))
            stack.enter_context(mock.patch("taming_jax.training.prior.PriorStage.draw_figures"))
        status = run_for_status(*map(str, arguments))
    return status, out.getvalue(), err.getvalue()


def find_free_port() -> int:
    """Returns a port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
