"""What steps take of a device."""

import types

import pytest

from taming_jax.config import load_config
from taming_jax.train.meter import Meter, peak_flops


def device(kind, platform="gpu"):
    stats = {"peak_bytes_in_use": 5, "bytes_in_use": 3}
    return types.SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)


def test_utilisation_is_of_the_devices_own_most():
    told = []
    found = Meter(device("NVIDIA H100 80GB HBM3"), load_config("mnist"), told.append)(1e12, 49.47)
    assert found == {
        "memory_peak_bytes": 5,
        "flops_per_second": pytest.approx(49.47e12),
        "utilisation": 0.1,
    }
    half = load_config("mnist", {"dtype": "bfloat16"})
    assert Meter(device("NVIDIA H100 80GB HBM3"), half, told.append)(1e12, 98.94)[
        "utilisation"
    ] == pytest.approx(0.1)
    assert not told


def test_a_device_that_is_not_known_is_said_so_once():
    told = []
    meter = Meter(device("NVIDIA Z9"), load_config("mnist"), told.append)
    for _ in range(2):
        assert "utilisation" not in meter(1e12, 2.0)
    assert len(told) == 1 and "NVIDIA Z9" in told[0]
    assert meter(None, 2.0) == {"memory_peak_bytes": 5}


def test_names_that_begin_alike_are_told_apart():
    assert peak_flops("NVIDIA L40S", "float32") == 183e12
    assert peak_flops("NVIDIA L40", "float32") == 90.5e12
    assert peak_flops("NVIDIA L4", "float32") == 60e12
    assert peak_flops("NVIDIA A10G", "bfloat16") == 70e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bfloat16") is None
