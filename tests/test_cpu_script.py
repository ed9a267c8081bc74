"""`scripts/cpu.sh`, by what it leaves in the environment."""

import os
import subprocess

import pytest

from tests import commands


@pytest.fixture
def sourced(tmp_path):
    """The two variables after the script, beside a GPU or not."""

    def run(gpu, **given):
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{'echo GPU 0: one' if gpu else 'exit 9'}\n")
        smi.chmod(0o755)
        kept = {k: x for k, x in os.environ.items() if k not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
        told = f'set -euo pipefail; source "{commands.ROOT}/scripts/cpu.sh"; '
        told += 'echo "${XLA_FLAGS:-}"; echo "${GLIBC_TUNABLES:-}"'
        environment = kept | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        out = subprocess.run(
            ["bash", "-c", told], env=environment, capture_output=True, text=True, check=True
        ).stdout
        return out.splitlines()

    return run


def test_a_cpu_is_two_devices_and_keeps_its_memory(sourced):
    flags, tunables = sourced(gpu=False)
    expected = "--xla_force_host_platform_device_count=2"
    assert flags.strip() == (expected if os.cpu_count() > 1 else "")
    assert "glibc.malloc.hugetlb=1" in tunables and "trim_threshold" in tunables


def test_a_gpu_and_what_is_set_stay(sourced):
    assert sourced(gpu=True) == ["", ""]
    given = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "GLIBC_TUNABLES": "glibc.malloc.check=1",
    }
    assert sourced(gpu=False, **given) == list(given.values())
    flags, _ = sourced(gpu=False, XLA_FLAGS="--xla_cpu_enable_fast_math=false")
    assert flags.startswith("--xla_cpu_enable_fast_math=false")
