"""Runs the same step function on one device with `jit`, or on several devices, of one or more
processes, with `pmap`.

The step functions differ only in the name of the axis that they average over: None or "devices".
With several devices, the state is replicated: every leaf has a leading axis for this process's
devices.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.errors import UserError
from taming_jax.parallel import distributed

# The most arrays that `Devices.fetch_rows` joins on a device. Each number is compiled once, and
# compiling a large one takes seconds.
MAX_JOINED = 64


def maybe_pmean(tree: Any, axis_name: str | None) -> Any:
    """Returns the mean of a tree over the devices, or the tree itself if `axis_name` is None."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def maybe_psum(tree: Any, axis_name: str | None) -> Any:
    """Returns the sum of a tree over the devices, or the tree itself if `axis_name` is None."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def count_flops(lowered: Any) -> float | None:
    """Returns the number of floating-point operations of a lowered function, before XLA replaces
    some with library calls, or None if JAX cannot count them."""
    costs = lowered.cost_analysis()
    if costs is None:  # GPU plugins have no analysis; that of the CPU is private
        try:
            from jax._src.lib import _jax

            module = lowered.compiler_ir("hlo").as_hlo_module()
            client = jax.local_devices(backend="cpu")[0].client
            costs = _jax.hlo_module_cost_analysis(client, module)
        except (ImportError, AttributeError, RuntimeError):
            return None
    return costs.get("flops")


def map_batches(apply: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Applies a function to a tree of arrays [n, ...] in batches of `size`, and returns a tree of
    numpy arrays [n, ...]. Copies of the last row pad the last batch."""
    n, parts = len(jax.tree.leaves(arrays)[0]), []
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)
        batch = jax.tree.map(lambda x, rows=rows: x[rows], arrays)
        parts.append(jax.tree.map(np.asarray, apply(batch)))
    return jax.tree.map(lambda *batches: np.concatenate(batches)[:n], *parts)


@jax.jit
def copy_buffers(tree: Any) -> Any:
    """Copies a tree into new buffers. JAX crashes if a donated state holds a buffer twice."""
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def copy_first_rows(tree: Any) -> Any:
    """Copies the first rows of the arrays of a tree into new buffers."""
    return jax.tree.map(lambda x: jnp.copy(x[0]), tree)


class Compiled:
    """A function of a state and arrays, whose frozen arguments are bound. `prepare` or the first
    call compiles it."""

    flops: float | None = None
    """The number of floating-point operations per call and device, set by `prepare`. The body of a
    loop counts once, and cuDNN's attention not at all."""

    def __init__(self, function: Any, frozen: tuple[Any, ...]):
        self._function, self._program, self.frozen = function, function, frozen

    def __call__(self, state: Any, arrays: Any) -> Any:
        return self._program(state, arrays, *self.frozen)

    def prepare(self, state: Any, arrays: Any) -> None:
        """Compiles the function for the shapes of these arguments, which all calls must share. With
        several processes, the first call compiles it, since JAX cannot call a function that was
        lowered for several processes."""
        lowered = self._function.lower(state, arrays, *self.frozen)
        self.flops = count_flops(lowered)
        if distributed.process_count() == 1:
            self._program = lowered.compile()


def get_default_device() -> Any:
    """Returns the device for which JAX compiles by default."""
    device = jax.config.values["jax_default_device"]
    if isinstance(device, str):  # the name of a platform
        return jax.local_devices(backend=device)[0]
    return device or jax.local_devices()[0]


def get_compute_capability(device: Any) -> tuple[int, int]:
    """Returns the compute capability of an NVIDIA GPU, or (0, 0) for any other device."""
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return 0, 0
    return int(numbers[0]), int(numbers[1])


def resolve_dtype(name: str) -> str:
    """Returns the dtype itself or, for auto, bfloat16 if this process's devices are NVIDIA GPUs
    that have it, and float32 otherwise."""
    if name != "auto":
        return name
    has_bfloat16 = all(get_compute_capability(device) >= (8, 0) for device in jax.local_devices())
    return "bfloat16" if has_bfloat16 else "float32"


def select_devices(count: int | None) -> list[Any]:
    """Returns this process's first `count` devices, or all if None. Raises UserError for an invalid
    count."""
    available = jax.local_devices()
    if count is not None and not 1 <= count <= len(available):
        where = "" if distributed.process_count() == 1 else " in this process"
        raise UserError(
            f"--devices is {count}, but the number of {available[0].platform} devices{where} is "
            f"{len(available)}; set it to a number from 1 to {len(available)}."
        )
    return available[:count]


class Devices:
    """The devices that a run uses: the first `count` of each process, or all if None.

    Raises UserError for an invalid count, or if the processes have different numbers of devices.
    """

    def __init__(self, count: int | None = None):
        self.list = distributed.run_on_all(lambda: select_devices(count))
        counts, memories = zip(
            *distributed.all_gather_objects((len(self.list), self._get_local_memory())), strict=True
        )
        if len(set(counts)) > 1:
            raise UserError(
                f"the processes have different numbers of devices ({', '.join(map(str, counts))}); "
                "set --devices to the smallest."
            )
        self._all = [
            device
            for process in range(distributed.process_count())
            for device in jax.local_devices(process)[: len(self.list)]
        ]
        # The minimum, since decisions that depend on it must be the same in all processes.
        self.memory = min(memories)
        """Bytes of memory per device; on a CPU, a device's share of the machine's memory."""
        self.axis_name = "devices" if len(self) > 1 else None
        # The sharding of pmap's results; another one would recompile the next step.
        self._sharding = jax.sharding.NamedSharding(
            jax.sharding.Mesh(np.array(self.list), ("devices",)),
            jax.sharding.PartitionSpec("devices"),
        )

    def __len__(self) -> int:
        """Returns the number of devices of all processes."""
        return len(self._all)

    def _get_local_memory(self) -> int:
        stats = self.list[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return machine // len(self.list)

    def describe(self) -> dict[str, Any]:
        """Returns what rounding errors depend on: the devices and, for GPUs, the version of their
        runtime; the processes, the CPU and the cores of it that this process may use; and the
        versions of the packages."""
        device = self.list[0]
        runtime = {} if device.platform == "cpu" else {"runtime": device.client.platform_version}
        return {
            "devices": len(self), "device_kind": device.device_kind, **runtime,
            "processes": distributed.process_count(), "cpu": distributed.hash_cpu(),
            "cores": distributed.count_cores(), "versions": distributed.get_versions(),
        }  # fmt: skip

    def get_local_rows(self, batch_size: int) -> slice:
        """Returns the rows of a batch that this process reads."""
        size = batch_size // distributed.process_count()
        return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

    def check_batch(self, name: str, batch_size: int, micro_batches: int = 1) -> None:
        """Raises UserError if a batch cannot be divided equally among the devices, and the part of
        each device into `micro_batches`."""
        n = len(self)
        if batch_size % (n * micro_batches):
            processes = distributed.process_count()
            where = "" if processes == 1 else f" of {processes} processes"
            parts, alternative = "", ""
            if micro_batches > 1:
                parts = f" with {micro_batches} --{name}.micro-batches each"
                alternative = f" or --{name}.micro-batches"
            raise UserError(
                f"--{name}.batch-size {batch_size} cannot be divided equally among {n} "
                f"device{'s' * (n > 1)}{where}{parts}; use a multiple of {n * micro_batches}, or "
                f"fewer --devices{alternative}."
            )

    def compile(self, function: Callable, *frozen: Any, donate: bool = False) -> "Compiled":
        """Returns a function of `state` and `arrays` that runs `function(state, arrays, *frozen)`
        on the devices.

        `frozen` are replicated arrays that never change. `donate` donates the state's buffers.
        """
        donate_argnums = (0,) if donate else ()
        if self.axis_name is None:
            compiled = jax.jit(function, donate_argnums=donate_argnums)
        else:
            compiled = jax.pmap(
                function, axis_name=self.axis_name, devices=self._all, donate_argnums=donate_argnums
            )
        return Compiled(compiled, frozen)

    def replicate(self, tree: Any) -> Any:
        """Copies a tree of arrays to every device."""
        if self.axis_name is None:
            return jax.device_put(tree, self.list[0])

        def broadcast(x: Any) -> np.ndarray:
            x = np.asarray(x)
            return np.broadcast_to(x, (len(self.list), *x.shape))

        return jax.device_put(jax.tree.map(broadcast, tree), self._sharding)

    def shard(self, tree: Any, axis: int = 0) -> Any:
        """Divides arrays [n, ...], this process's rows of a batch, among its devices. Returns
        arrays [devices, n / devices, ...], or [n, ...] on a single device, without waiting for the
        transfer. `axis` is the axis of the rows."""
        if self.axis_name is None:
            return jax.device_put(tree, self.list[0])

        def divide(x: np.ndarray) -> np.ndarray:
            size = x.shape[axis] // len(self.list)
            shape = (*x.shape[:axis], len(self.list), size, *x.shape[axis + 1 :])
            return np.moveaxis(x.reshape(shape), axis, 0)

        return jax.device_put(jax.tree.map(divide, tree), self._sharding)

    def reduce_max(self, value: int) -> jax.Array:
        """Returns the maximum of all processes' values, a replicated int32, without waiting."""
        return self._reduce_max(np.full(len(self.list), value, np.int32))

    @functools.cached_property
    def _reduce_max(self) -> Callable[[np.ndarray], jax.Array]:
        return jax.pmap(
            lambda x: jax.lax.pmax(x, "devices"), axis_name="devices", devices=self._all
        )

    def gather(self, values: jax.Array) -> np.ndarray:
        """Returns a compiled function's result [n, ...] for a sharded batch, gathered from all
        devices of all processes."""
        array = np.asarray(values)
        if self.axis_name is None:
            return array
        return np.concatenate(
            distributed.all_gather_objects(
                array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
            )
        )

    def map_batches(self, apply: Callable[[Any], Any], arrays: Any, size: int) -> Any:
        """Does the same as the function `map_batches`, on all processes, which must pass the same
        arrays. `apply` takes this process's rows of a batch, and returns a tree of sharded results
        of a compiled function."""

        def apply_on_all(batch: Any) -> Any:
            local = jax.tree.map(lambda x: x[self.get_local_rows(size)], batch)
            return jax.tree.map(self.gather, apply(local))

        return map_batches(apply_on_all, arrays, size)

    def fetch(self, tree: Any) -> Any:
        """Returns a replicated tree as numpy arrays, copied from one device. (Without the copy, an
        array on a CPU would share a buffer that the next step overwrites.)"""
        if self.axis_name is None:
            return jax.tree.map(lambda x: np.array(x), tree)
        return jax.tree.map(lambda x: np.array(x.addressable_data(0))[0], tree)

    def snapshot(self, tree: Any) -> Any:
        """Returns a copy of a replicated tree on one device, without waiting for it. Later steps do
        not change it, although they overwrite the buffers of the tree."""
        if self.axis_name is None:
            return copy_buffers(tree)
        return copy_first_rows(jax.tree.map(lambda x: x.addressable_data(0), tree))

    def fetch_rows(self, arrays: Sequence[Any], columns: int) -> np.ndarray:
        """Returns replicated arrays of rows [..., columns], one below the other, [n, columns]. One
        transfer fetches up to `MAX_JOINED` arrays."""
        local = [x if self.axis_name is None else x.addressable_data(0) for x in arrays]
        groups = (local[i : i + MAX_JOINED] for i in range(0, len(local), MAX_JOINED))
        joined = jax.device_get([jnp.concatenate([x.ravel() for x in group]) for group in groups])
        return np.concatenate(joined).reshape(-1, columns)
