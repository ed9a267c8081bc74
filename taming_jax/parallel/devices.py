"""One step function on one device by `jit`, or on several, of one process or of several, by `pmap`.

What differs is only the axis name that a step averages over: None, or "devices". On several devices
the state is replicated: every leaf has a leading axis of this process's devices.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taming_jax.errors import UserError
from taming_jax.parallel import distributed


def maybe_pmean(tree: Any, axis_name: str | None) -> Any:
    """Inside a step: the mean over the devices of an axis; the tree itself where there is none."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def maybe_psum(tree: Any, axis_name: str | None) -> Any:
    """Inside a step: the sum over the devices of an axis; the tree itself where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def count_flops(lowered: Any) -> float | None:
    """Floating-point operations of a function as it is written, before XLA puts a library's in
    place of them; None where JAX cannot tell. It does not for the plugins of GPUs, so the CPU's
    analysis is asked there, by a private name."""
    found = lowered.cost_analysis()
    if found is None:
        try:
            from jax._src.lib import _jax

            module = lowered.compiler_ir("hlo").as_hlo_module()
            client = jax.local_devices(backend="cpu")[0].client
            found = _jax.hlo_module_cost_analysis(client, module)
        except (ImportError, AttributeError, RuntimeError):
            return None
    return found.get("flops")


def in_batches(apply: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """What `apply` returns of arrays [n, ...], a tree, in batches of one size, of which the last is
    filled up with its last row: a tree of numpy arrays [n, ...]."""
    n, parts = len(jax.tree.leaves(arrays)[0]), []
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)
        batch = jax.tree.map(lambda x, rows=rows: x[rows], arrays)
        parts.append(jax.tree.map(np.asarray, apply(batch)))
    return jax.tree.map(lambda *each: np.concatenate(each)[:n], *parts)


class Compiled:
    """A function of state and arrays with its frozen arguments in place, compiled when it is first
    called, or by `prepare`."""

    flops: float | None = None
    """Floating-point operations of a call on one device, where `prepare` found them; what is in a
    loop counts once."""

    def __init__(self, function: Any, frozen: tuple[Any, ...]):
        self._function, self._program, self.frozen = function, function, frozen

    def __call__(self, state: Any, arrays: Any) -> Any:
        return self._program(state, arrays, *self.frozen)

    def prepare(self, state: Any, arrays: Any) -> None:
        """Compiles for all calls, which must have arguments of these shapes. With other processes
        the first call still compiles, since JAX cannot call what it lowered for several."""
        lowered = self._function.lower(state, arrays, *self.frozen)
        self.flops = count_flops(lowered)
        if distributed.process_count() == 1:
            self._program = lowered.compile()


def first_devices(count: int | None) -> list[Any]:
    """The first devices of this process, or all. UserError where there are not so many."""
    available = jax.local_devices()
    if count is not None and not 1 <= count <= len(available):
        where = "" if distributed.process_count() == 1 else " in this process"
        raise UserError(
            f"--devices is {count}, but there are {len(available)}{where} "
            f"({available[0].platform}); ask for 1 to that many."
        )
    return available[:count]


class Devices:
    """The devices a run uses: the first `count` of each process, or all. UserError where there are
    not so many, or one process has more than another."""

    def __init__(self, count: int | None = None):
        self.list = distributed.run_on_all(lambda: first_devices(count))
        of_each, memories = zip(
            *distributed.all_gather_objects((len(self.list), self._own_memory())), strict=True
        )
        if len(set(of_each)) > 1:
            raise UserError(
                f"the processes have {', '.join(map(str, of_each))} devices; all must have as "
                "many. Ask for the least of them by --devices."
            )
        self._of_all = [
            device
            for process in range(distributed.process_count())
            for device in jax.local_devices(process)[: len(self.list)]
        ]
        # The least of all processes, since they have to choose alike.
        self.memory = min(memories)
        """Bytes of memory a device has; on a CPU, its part of what its devices share."""
        self.axis_name = "devices" if len(self) > 1 else None
        # The layout that pmap returns with: another one would compile the next step again.
        self._layout = jax.sharding.NamedSharding(
            jax.sharding.Mesh(np.array(self.list), ("devices",)),
            jax.sharding.PartitionSpec("devices"),
        )

    def __len__(self) -> int:
        """How many devices there are in all processes."""
        return len(self._of_all)

    def _own_memory(self) -> int:
        stats = self.list[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return machine // len(self.list)

    def own(self, batch_size: int) -> slice:
        """The rows of a batch that this process reads: all, or of several processes its part."""
        size = batch_size // distributed.process_count()
        return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

    def check_batch(self, name: str, batch_size: int, micro_batches: int = 1) -> None:
        """UserError where a batch cannot be divided among the devices, and each device's part of it
        into so many micro-batches."""
        n = len(self)
        if batch_size % (n * micro_batches):
            of = (
                ""
                if distributed.process_count() == 1
                else f" of {distributed.process_count()} processes"
            )
            parts, fewer = "", ""
            if micro_batches > 1:
                parts = f", in {micro_batches} --{name}.micro-batches on each"
                fewer = f" or --{name}.micro-batches"
            raise UserError(
                f"--{name}.batch-size {batch_size} cannot be divided among {n} devices{of}{parts}; "
                f"take a multiple of {n * micro_batches}, or fewer --devices{fewer}."
            )

    def compile(self, function: Callable, *frozen: Any, donate: bool = False) -> "Compiled":
        """`function(state, arrays, *frozen)` as a function of the first two on the devices.

        `frozen` are arrays that never change, replicated already; `donate` gives up the state.
        """
        first = (0,) if donate else ()
        if self.axis_name is None:
            compiled = jax.jit(function, donate_argnums=first)
        else:
            compiled = jax.pmap(
                function, axis_name=self.axis_name, devices=self._of_all, donate_argnums=first
            )
        return Compiled(compiled, frozen)

    def replicate(self, tree: Any) -> Any:
        """The same arrays on every device."""
        if self.axis_name is None:
            return jax.device_put(tree, self.list[0])

        def spread(x: Any) -> np.ndarray:
            x = np.asarray(x)
            return np.broadcast_to(x, (len(self.list), *x.shape))

        return jax.device_put(jax.tree.map(spread, tree), self._layout)

    def shard(self, tree: Any) -> Any:
        """Arrays [n, ...], this process's rows of a batch, divided along their first axis, on its
        devices: [devices, n / devices, ...]. They may still be on their way."""
        if self.axis_name is None:
            return jax.device_put(tree, self.list[0])
        count = len(self.list)
        parts = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), tree)
        return jax.device_put(parts, self._layout)

    def largest(self, value: int) -> jax.Array:
        """The largest of the values that the processes give, int32 replicated; it may still be on
        its way."""
        return self._largest(np.full(len(self.list), value, np.int32))

    @functools.cached_property
    def _largest(self) -> Callable[[np.ndarray], jax.Array]:
        return jax.pmap(
            lambda x: jax.lax.pmax(x, "devices"), axis_name="devices", devices=self._of_all
        )

    def gather(self, values: jax.Array) -> np.ndarray:
        """What a compiled function returned for a sharded batch, from all devices of all
        processes: [n, ...]."""
        array = np.asarray(values)
        if self.axis_name is None:
            return array
        return np.concatenate(
            distributed.all_gather_objects(
                array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
            )
        )

    def in_batches(self, apply: Callable[[Any], Any], arrays: Any, size: int) -> Any:
        """`in_batches` over all processes, which have the same arrays: `apply` is given this
        process's rows of each batch, and returns a tree of what a compiled function returned for
        them, sharded."""

        def of_all(batch: Any) -> Any:
            own = jax.tree.map(lambda x: x[self.own(size)], batch)
            return jax.tree.map(self.gather, apply(own))

        return in_batches(of_all, arrays, size)

    def fetch(self, tree: Any) -> Any:
        """A replicated tree as numpy arrays of one device's, in memory of their own (on a CPU
        numpy would else look into a buffer that the next step overwrites)."""
        if self.axis_name is None:
            return jax.tree.map(lambda x: np.array(x), tree)
        return jax.tree.map(lambda x: np.array(x.addressable_data(0))[0], tree)
