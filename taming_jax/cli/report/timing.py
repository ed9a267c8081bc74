"""The timing of functions on a device, and the sizes and inputs that all rows of the report use."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.config.load import load_config
from taming_jax.config.schema import Config
from taming_jax.data.augment import get_stored_size
from taming_jax.data.datasets import Split, Splits
from taming_jax.errors import UserError

# A measurement of a row: what it measured, and its values by name.
Entry = tuple[str, dict[str, Any]]

CLASSES = 200  # as in the birds dataset
# The sizes for --tiny, for any preset. VGG16 needs 16 pixels.
TINY: dict[str, Any] = {
    "data.image_size": 16, "vqgan.channels": 8, "vqgan.multipliers": (1, 2, 2), "vqgan.blocks": 1,
    "vqgan.attention_resolutions": (4,), "vqgan.latent_channels": 8, "vqgan.batch_size": 4,
    "vqgan.codebook_size": 32, "vqgan.discriminator_filters": 8, "vqgan.discriminator_layers": 2,
    "prior.layers": 2, "prior.heads": 2, "prior.width": 32, "prior.batch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What the rows of a report share: the output folder, the folder of the recorded outputs of the
    official modules, if there is one, whether to use toy sizes, and whether VGG16's weights are
    random."""

    out: Path
    golden: Path | None
    tiny: bool
    random_vgg: bool

    @property
    def steps(self) -> int:
        """The number of times to run a function that takes milliseconds."""
        return 2 if self.tiny else 60

    def load_config(self, preset: str, overrides: dict[str, Any]) -> Config:
        """Loads a preset, with toy sizes if the report is tiny."""
        return load_config(preset, (TINY if self.tiny else {}) | overrides)


def time_calls(
    call: Callable[[], Any], steps: int, wait: Callable[[Any], Any] = jax.block_until_ready
) -> dict[str, float]:
    """Returns the duration of a call that only starts work on a device, in milliseconds.

    `milliseconds` is the mean over `steps` calls that are enqueued without waiting, up to the end
    of the last one's work. `host_milliseconds` is the median time that a call takes to return,
    each time from an idle device. Before that, a sixth as many calls warm up the device.
    """
    for _ in range(math.ceil(steps / 6)):
        result = call()
    wait(result)
    start = time.perf_counter()
    for _ in range(steps):
        result = call()
    wait(result)
    seconds = (time.perf_counter() - start) / steps
    host = []
    for _ in range(math.ceil(steps / 12)):
        start = time.perf_counter()
        result = call()
        host.append(time.perf_counter() - start)
        wait(result)
    return {"milliseconds": 1e3 * seconds, "host_milliseconds": 1e3 * statistics.median(host)}


def make_random_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns random images, uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_random_params(model: Any, *shapes: tuple[tuple[int, ...], str]) -> Any:
    """Returns random parameters of a Linen module as numpy arrays, given the shapes and dtypes of
    its inputs. Unlike its own initialization, this needs no compilation."""
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(x.dtype), params)


def make_random_splits(config: Config, train: int = 512, validation: int = 32) -> Splits:
    """Returns a dataset of random images of the sizes that a config's dataset has."""
    data = config.data

    def make_split(n: int, size: int, seed: int) -> Split:
        labels = np.arange(n, dtype=np.int32) % CLASSES
        return Split(make_random_images((n, size, size, data.channels), seed), labels)

    held_out = make_split(validation, data.image_size, 1)
    names = tuple(f"class {i}" for i in range(CLASSES))
    return Splits(make_split(train, get_stored_size(data), 0), held_out, held_out, names)


def require_gpu(job: Job, available: bool) -> None:
    """Raises UserError without a GPU, unless the report is tiny: full sizes take hours on a CPU."""
    if not job.tiny and not available:
        raise UserError("there is no GPU; add --tiny for a test on a CPU.")
