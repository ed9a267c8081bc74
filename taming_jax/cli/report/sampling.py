"""The speed of sampling from the prior."""

import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.cli.report.timing import (
    CLASSES,
    Entry,
    Job,
    make_random_params,
    require_gpu,
    time_calls,
)
from taming_jax.cli.report.trace import count_copies_in_loops
from taming_jax.models.vqgan import build_vqgan, decode_indices
from taming_jax.priors.decoding import sample_keys
from taming_jax.priors.registry import build_prior
from taming_jax.training.meter import peak_memory


def get_micro_batches(job: Job) -> tuple[int, ...]:
    return (2, 4) if job.tiny else (32, 256, 512)


def run_sampling(job: Job, preset: str, dtype: str) -> Iterator[Entry]:
    """The row of sampling with guidance, and of decoding. `cache_copies` counts the copies of
    arrays as large as a layer's keys or values in the compiled loops over positions; there should
    be none."""
    require_gpu(job, jax.default_backend() != "cpu")
    config = job.load_config(preset, {"dtype": dtype})
    prior = build_prior(config, CLASSES)
    generator = build_vqgan(config)
    scale = config.prior.guidance_scale or 1.5
    length, width = config.grid_size**2, config.prior.width
    data = config.data
    params = jax.device_put(make_random_params(prior, ((1, length), "int32")))
    image = (1, data.image_size, data.image_size, data.channels), "float32"
    decoder = jax.device_put(make_random_params(generator, image))

    def sample(params: Any, labels: jax.Array) -> jax.Array:
        keys = sample_keys(np.uint32(0), labels, jnp.arange(len(labels)))
        return prior.sample(params, labels, keys, guidance_scale=scale).codes

    decode = jax.jit(functools.partial(decode_indices, generator))
    for batch in get_micro_batches(job):
        labels = jnp.arange(batch, dtype=jnp.int32) % CLASSES
        start = time.perf_counter()
        program = jax.jit(sample).lower(params, labels).compile()
        seconds, steps = time.perf_counter() - start, max(job.steps // 20, 1)
        codes = program(params, labels)
        draw = functools.partial(program, params, labels)
        sampling = time_calls(draw, steps)["milliseconds"]
        decoding = time_calls(functools.partial(decode, decoder, codes), steps)["milliseconds"]

        # With guidance, each image is two sequences. Smaller arrays, such as the hidden layer of
        # the MLP, may also be multiples of a row.
        def is_cache(elements: int, row: int = 2 * batch * width) -> bool:
            return elements % row == 0 and elements >= 8 * row

        yield (
            f"{preset}, JAX, {dtype}, micro-batch {batch}",
            {
                "codes_per_second": 1e3 * batch * length / sampling,
                "images_per_second": 1e3 * batch / (sampling + decoding),
                "sampling_milliseconds": sampling,
                "decoding_milliseconds": decoding,
                "cache_copies": count_copies_in_loops(program.as_text() or "", is_cache),
                "peak_mib": peak_memory(jax.devices()[0]) / 2**20,
                "compile_seconds": seconds,
            },
        )
