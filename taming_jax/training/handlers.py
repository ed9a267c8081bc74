"""How Orbax writes and reads a checkpoint's items: arrays, and what is said of them."""

import logging
import os
import re
import sys
import warnings
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers


def quiet_orbax() -> None:
    """Hides the tracebacks that Orbax and tensorstore's threads print of a failed read or save
    besides raising it: `Store` says it in a sentence."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    never = r"coroutine '(_create_paths|\w*Handler\.\w+)' was never awaited"
    warnings.filterwarnings("ignore", never, RuntimeWarning)
    hook = sys.unraisablehook

    def others(unraisable: Any) -> None:
        # An event loop is closed at the first failure, and tensorstore tells it of the rest.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = others


quiet_orbax()


def describe_failure(error: Exception) -> str:
    """Why something could not be written: in the system's words, where there are any."""
    number = re.search(r"os_error_code='(\d+)'", str(error))  # as tensorstore has it
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# Only the first of several processes has to do with checkpoints: Orbax waits for no other.
ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="taming_jax"
)
SHARD = 2**26  # bytes a file, where memory is spared


def arrays_handler() -> ocp.StandardCheckpointHandler:
    return ocp.StandardCheckpointHandler(multiprocessing_options=ALONE)


def sparing_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes what the other reads, without a copy of the arrays first: they must not change."""
    numpy = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=ALONE,
        type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, numpy)),
    )


def arrays_to_save(tree: Any, sparing: bool) -> ocp.args.CheckpointArgs:
    """A tree of numpy arrays for one of the two."""
    if sparing:
        return ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=SHARD)
    return ocp.args.StandardSave(tree)


def json_handler() -> ocp.JsonCheckpointHandler:
    return ocp.JsonCheckpointHandler(multiprocessing_options=ALONE)
