"""Writes and reads checkpoints of numpy arrays with Orbax, in a single process."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import type_handlers

# Orbax's threads log tracebacks of errors that they also raise and that `Store` reports.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

# Only the primary process writes checkpoints; Orbax must not wait for the others.
PRIMARY_ONLY = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="taming_jax"
)


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns a handler that reads and writes trees of numpy arrays. It does not copy the arrays
    before writing, so they must not change until the write is complete."""
    handler = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=PRIMARY_ONLY,
        type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, handler)),
    )


def write_checkpoint(
    path: Path, arrays: Mapping[tuple[str, ...], np.ndarray], metadata: dict[str, Any]
) -> None:
    """Writes a checkpoint in one atomic commit: the arrays, named by their paths, as the item
    `state`, and the metadata as the item `about`. Raises OSError, ValueError or RuntimeError if it
    cannot be written."""
    handler = ocp.CompositeCheckpointHandler(
        state=arrays_handler(),
        about=ocp.JsonCheckpointHandler(multiprocessing_options=PRIMARY_ONLY),
        composite_options=ocp.CompositeOptions(multiprocessing_options=PRIMARY_ONLY),
    )
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays)),
        about=ocp.args.JsonSave(metadata),
    )
    with ocp.Checkpointer(handler, multiprocessing_options=PRIMARY_ONLY) as checkpointer:
        checkpointer.save(path, args=items)


def read_state(path: Path) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the arrays of a checkpoint, named by their paths. Orbax does not document which
    exceptions damage raises."""
    checkpointer = ocp.Checkpointer(arrays_handler(), multiprocessing_options=PRIMARY_ONLY)
    tree = checkpointer.restore(path / "state")
    return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(tree).items()}


def describe_failure(error: Exception) -> str:
    """Returns the reason why a write failed: the operating system's message, if the error holds an
    error code, or else the first line of the error."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # the format of tensorstore
    if code:
        return os.strerror(int(code[1]))
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
