"""What training takes of a device: its memory, its arithmetic, its time, and a trace of chosen
steps."""

import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from taming_jax.config.schema import Config

# The most that a device does in a second, in 10^12 operations, as NVIDIA's data sheets have it,
# without sparsity: float32 (in TF32, where there is one, as XLA multiplies float32), and bfloat16.
# A device's name is one of these, and perhaps more of BESIDES; the longest one counts.
PEAKS: dict[str, tuple[float, float | None]] = {
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


# What a device's name may have besides: its memory's size and kind, its connector.
BESIDES = r"\d+ ?GB|SXM\d?|PCI[Ee]|HBM\w+"


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Floating-point operations a second that a device can do at most; None where unknown."""
    for name in sorted(PEAKS, key=len, reverse=True):
        rest = device_kind.removeprefix(name)
        if rest != device_kind and re.fullmatch(rf"([- ]({BESIDES}))*", rest):
            peak = PEAKS[name][dtype == "bfloat16"]
            return None if peak is None else peak * 1e12
    return None


def peak_memory(device: Any) -> int:
    """The most bytes that were in use at once on a device; where it keeps no account, as a CPU
    does not, in this process."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Reads what steps take of one device, the first. `say` is told, once, where the most that it
    can do is not known."""

    def __init__(self, device: Any, config: Config, say: Callable[[str], None]):
        self._device, self._peak = device, peak_flops(device.device_kind, config.dtype)
        if self._peak is None and device.platform == "gpu":
            say(
                f"How much a {device.device_kind} can do at most in {config.dtype} is not known "
                "here: the log has no utilisation."
            )

    def __call__(self, flops: float | None, steps_per_second: float) -> dict[str, float]:
        """`memory_peak_bytes`; `flops_per_second`, where the operations of a step are known; and
        `utilisation`, their share of the most there can be, where that is."""
        metrics: dict[str, float] = {"memory_peak_bytes": peak_memory(self._device)}
        if flops is not None:
            metrics["flops_per_second"] = flops * steps_per_second
            if self._peak is not None:
                metrics["utilisation"] = round(metrics["flops_per_second"] / self._peak, 4)
        return metrics


class Tracer:
    """jax.profiler's trace of steps `first` to `last` of a run, in `folder`; of none where `steps`
    is None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, say: Callable[[str], None]):
        self._first, self._last = steps or (0, 0)
        self._folder, self._say, self._running = folder, say, False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context for a step, by its number (the first is 1)."""
        if self._first <= number <= self._last and not self._running:
            self._first = number
            try:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
                self._running = True
            except (OSError, RuntimeError) as error:  # another profiler is tracing
                self._say(f"No step is traced ({error}); the run goes on.")
                self._last = 0
        return jax.profiler.StepTraceAnnotation("step", step_num=number)

    def after(self, number: int, results: Any) -> None:
        """After a step, with its results, for which the last traced step waits."""
        if self._running and number >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace and writes it, if the disk allows."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            self._say(f"Steps {self._first} to {self._last} are traced in {self._folder}.")
        except (OSError, RuntimeError) as error:
            self._say(f"The trace cannot be written to {self._folder} ({error}); the run goes on.")
