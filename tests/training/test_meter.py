"""Tests of the measured speed, memory, and utilization of a device."""

import types

import jax
import jax.numpy as jnp
import pytest

from taming_jax.config.load import load_config
from taming_jax.parallel.devices import count_flops
from taming_jax.training.meter import Meter, peak_flops


def make_device(kind, platform="gpu"):
    stats = {"peak_bytes_in_use": 5, "bytes_in_use": 3}
    return types.SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)


def test_flops_are_counted_if_jax_does_not_count_them(monkeypatch):
    """The plugin of a GPU counts the FLOPs of compiled programs only."""
    x = jnp.ones((8, 8))
    lowered = jax.jit(lambda x: x @ x).lower(x)
    expected = count_flops(lowered)
    monkeypatch.setattr("jax._src.xla_bridge.using_pjrt_c_api", lambda *_: True)
    assert lowered.cost_analysis() is None
    assert count_flops(lowered) == expected == 2 * 8**3


def test_the_utilization_is_relative_to_the_peak_of_the_device():
    messages = []
    measurements = Meter(
        make_device("NVIDIA H100 80GB HBM3"), load_config("mnist"), messages.append
    )(1e12, 49.47)
    assert measurements == {
        "memory_peak_bytes": 5,
        "flops_per_second": pytest.approx(49.47e12),
        "utilisation": 0.1,
    }
    bfloat16_config = load_config("mnist", {"dtype": "bfloat16"})
    assert Meter(make_device("NVIDIA H100 80GB HBM3"), bfloat16_config, messages.append)(
        1e12, 98.94
    )["utilisation"] == pytest.approx(0.1)
    assert not messages


def test_an_unknown_device_is_reported_once():
    messages = []
    meter = Meter(make_device("NVIDIA Z9"), load_config("mnist"), messages.append)
    for _ in range(2):
        assert "utilisation" not in meter(1e12, 2.0)
    assert len(messages) == 1 and "NVIDIA Z9" in messages[0]
    assert meter(None, 2.0) == {"memory_peak_bytes": 5}


def test_devices_with_similar_names_are_distinguished():
    assert peak_flops("NVIDIA L40S", "float32") == 183e12
    assert peak_flops("NVIDIA L40", "float32") == 90.5e12
    assert peak_flops("NVIDIA L4", "float32") == 60e12
    assert peak_flops("NVIDIA A10G", "bfloat16") == 70e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA A100 80GB PCIe", "float32") == 156e12
    assert peak_flops("NVIDIA H100 PCIe", "float32") == 378e12
    for unknown in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_flops(unknown, "float32") is None
    assert peak_flops("Tesla V100-SXM2-16GB", "bfloat16") is None
