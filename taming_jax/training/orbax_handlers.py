"""How Orbax is set up here: for one process that writes, numpy arrays, and errors in sentences."""

import logging
import os
import re
import sys
import warnings
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

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


def quiet_orbax() -> None:
    """Hides the tracebacks that Orbax's and tensorstore's threads print in addition to raising an
    error, which `Store` reports in a sentence."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    never = r"coroutine '(_create_paths|\w*Handler\.\w+)' was never awaited"
    warnings.filterwarnings("ignore", never, RuntimeWarning)
    hook = sys.unraisablehook

    def others(unraisable: Any) -> None:
        # An event loop is closed at the first error, and tensorstore reports the rest to it.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = others


quiet_orbax()


def describe_failure(error: Exception) -> str:
    """Why something could not be written, in the operating system's words where it has any."""
    number = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
