"""What steps take of a device."""

import types

import jax
import jax.numpy as jnp
import pytest

from taming_jax.config.load import load_config
from taming_jax.parallel.devices import count_flops
from taming_jax.training.meter import Meter, peak_flops


def device(kind, platform="gpu"):
    stats = {"peak_bytes_in_use": 5, "bytes_in_use": 3}
    return types.SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)


def test_operations_are_counted_where_jax_does_not_count_them(monkeypatch):
    """As on a GPU, whose plugin tells nothing of what was not compiled."""
    x = jnp.ones((8, 8))
    lowered = jax.jit(lambda x: x @ x).lower(x)
    expected = count_flops(lowered)
    monkeypatch.setattr("jax._src.xla_bridge.using_pjrt_c_api", lambda *_: True)
    assert lowered.cost_analysis() is None
    assert count_flops(lowered) == expected == 2 * 8**3


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
    assert peak_flops("NVIDIA A100 80GB PCIe", "float32") == 156e12
    assert peak_flops("NVIDIA H100 PCIe", "float32") == 378e12
    for other in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_flops(other, "float32") is None
    assert peak_flops("Tesla V100-SXM2-16GB", "bfloat16") is None
