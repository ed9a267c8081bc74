"""How Orbax is set up here: for one process that writes, numpy arrays, and errors in sentences."""

import logging
import os
import re

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

# Their threads log the tracebacks of errors that they also raise, and `Store` reports.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

# Only the primary process writes checkpoints; Orbax must not wait for the others.
ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="taming_jax"
)


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes and reads trees of numpy arrays, without copying them first: they must not change
    while they are written."""
    handler = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=ALONE,
        type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, handler)),
    )


def describe_failure(error: Exception) -> str:
    """Why something could not be written, in the operating system's words where it has any."""
    number = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    if number:
        return os.strerror(int(number[1]))
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
