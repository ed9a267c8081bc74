"""Measurements of a device during training: memory, throughput, and profiler traces."""

import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from taming_jax.config.schema import Config

# Peak throughput without sparsity in 10^12 operations per second, from NVIDIA's data sheets, for
# float32 and bfloat16. The float32 value is for TF32 where the device has it, since XLA uses it by
# default. A device's name is one of these, followed by any number of suffixes (NAME_SUFFIX); the
# longest match counts.
PEAK_TFLOPS: dict[str, tuple[float, float | None]] = {
    "NVIDIA B200": (1125, 2250),
    "NVIDIA GH200": (494.7, 989.4),
    "NVIDIA H200": (494.7, 989.4),
    "NVIDIA H200 NVL": (417.5, 835),
    "NVIDIA H100 PCIe": (378, 756),
    "NVIDIA H100 NVL": (417.5, 835),
    "NVIDIA H100": (494.7, 989.4),
    "NVIDIA A100": (156, 312),
    "NVIDIA L40S": (183, 362),
    "NVIDIA L40": (90.5, 181),
    "NVIDIA L4": (60, 121),
    "NVIDIA A40": (74.8, 149.7),
    "NVIDIA A30": (82, 165),
    "NVIDIA A10G": (35, 70),
    "NVIDIA A10": (62.5, 125),
    "NVIDIA RTX A6000": (77.4, 154.8),
    "NVIDIA GeForce RTX 5090": (104.8, 209.5),
    "NVIDIA GeForce RTX 4090": (82.6, 165.2),
    "NVIDIA GeForce RTX 3090": (35.6, 71),
    "Tesla V100": (15.7, None),
    "Tesla T4": (8.1, None),
}


# Parts that may follow a device's name: the size and type of its memory, and its connector.
NAME_SUFFIX = r"\d+ ?GB|SXM\d?|PCI[Ee]|HBM\w+"


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak floating-point operations per second of a device, or None if unknown."""
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
        rest = device_kind.removeprefix(name)
        if rest != device_kind and re.fullmatch(rf"([- ]({NAME_SUFFIX}))*", rest):
            peak = PEAK_TFLOPS[name][dtype == "bfloat16"]
            return None if peak is None else peak * 1e12
    return None


def peak_memory(device: Any) -> int:
    """Returns the peak memory of a device in bytes. If the device does not report it, as is the
    case for a CPU, returns the peak memory of this process."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """A meter of the memory and throughput of training on one device. Calls `say` once if the peak
    throughput of a GPU is not known."""

    def __init__(self, device: Any, config: Config, say: Callable[[str], None]):
        self._device, self._peak = device, peak_flops(device.device_kind, config.dtype)
        if self._peak is None and device.platform == "gpu":
            say(
                f"The peak throughput of {device.device_kind} in {config.dtype} is not known, so "
                "the log has no utilization."
            )

    def __call__(self, flops: float | None, steps_per_second: float) -> dict[str, float]:
        """Returns `memory_peak_bytes`; `flops_per_second`, if `flops` per step are known; and
        `utilisation`, their share of the peak throughput, if that is known too."""
        metrics: dict[str, float] = {"memory_peak_bytes": peak_memory(self._device)}
        if flops is not None:
            metrics["flops_per_second"] = flops * steps_per_second
            if self._peak is not None:
                metrics["utilisation"] = round(metrics["flops_per_second"] / self._peak, 4)
        return metrics


class Tracer:
    """A tracer that writes jax.profiler's trace of some steps to `folder`. `steps` holds the first
    and the last step to trace; None traces no step."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, say: Callable[[str], None]):
        self._first, self._last = steps or (0, 0)
        self._folder, self._say, self._running = folder, say, False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Returns a context for a step, counted from 1. Starts the trace before its first step."""
        if self._first <= number <= self._last and not self._running:
            self._first = number
            try:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
                self._running = True
            except (OSError, RuntimeError) as error:  # for example, another profiler is active
                self._say(
                    f"The profiler cannot start ({error}); the run continues without a trace."
                )
                self._last = 0
        return jax.profiler.StepTraceAnnotation("step", step_num=number)

    def end_step(self, number: int, results: Any) -> None:
        """Ends the trace after its last step, once that step has computed its `results`."""
        if self._running and number >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Stops a running trace and writes it. Reports an error instead of raising it."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            self._say(f"The trace of steps {self._first} to {self._last} is in {self._folder}.")
        except (OSError, RuntimeError) as error:
            self._say(
                f"The trace cannot be written to {self._folder} ({error}); the run continues."
            )
