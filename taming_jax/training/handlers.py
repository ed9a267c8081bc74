"""How Orbax writes and reads a checkpoint's items: arrays, and what is said of them."""

from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

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
