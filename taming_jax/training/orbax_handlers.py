"""Orbax settings for checkpoints of numpy arrays that a single process writes."""

import logging
import os
import re

import numpy as np
import orbax.checkpoint as ocp
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


def describe_failure(error: Exception) -> str:
    """Returns the reason why a write failed: the operating system's message, if the error holds an
    error code, or else the first line of the error."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # the format of tensorstore
    if code:
        return os.strerror(int(code[1]))
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
