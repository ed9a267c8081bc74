"""Tests the environment variables that `scripts/cpu.sh` sets."""

import os
import subprocess

import pytest

from tests import commands


@pytest.fixture
def source_script(tmp_path):
    """Returns a function that runs the script, with or without a GPU, and returns the values of the
    two variables."""

    def run(gpu, **variables):
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{'echo GPU 0: one' if gpu else 'exit 9'}\n")
        smi.chmod(0o755)
        inherited = {
            k: x for k, x in os.environ.items() if k not in ("XLA_FLAGS", "GLIBC_TUNABLES")
        }
        command = f'set -euo pipefail; source "{commands.ROOT}/scripts/cpu.sh"; '
        command += 'echo "${XLA_FLAGS:-}"; echo "${GLIBC_TUNABLES:-}"'
        environment = inherited | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        out = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, check=True
        ).stdout
        return out.splitlines()

    return run


def test_a_cpu_becomes_two_devices_with_tuned_memory_allocation(source_script):
    flags, tunables = source_script(gpu=False)
    expected = "--xla_force_host_platform_device_count=2"
    assert flags.strip() == (expected if os.cpu_count() > 1 else "")
    assert "glibc.malloc.hugetlb=1" in tunables and "trim_threshold" in tunables


def test_with_a_gpu_or_existing_values_nothing_changes(source_script):
    assert source_script(gpu=True) == ["", ""]
    variables = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "GLIBC_TUNABLES": "glibc.malloc.check=1",
    }
    assert source_script(gpu=False, **variables) == list(variables.values())
    flags, _ = source_script(gpu=False, XLA_FLAGS="--xla_cpu_enable_fast_math=false")
    assert flags.startswith("--xla_cpu_enable_fast_math=false")
