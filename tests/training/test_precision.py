"""Tests of bfloat16: which operations stay float32, and how close the gradients are to those in
float32."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taming_jax.config.load import load_config
from taming_jax.config.schema import PriorConfig
from taming_jax.data.batches import ResidentFeed
from taming_jax.data.datasets import Split
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.models.vqgan import build_vqgan
from taming_jax.parallel.devices import Devices
from taming_jax.priors.autoregressive import GPT
from taming_jax.training.prior import init_transformer, train_step
from taming_jax.training.state import Net
from taming_jax.training.vqgan_step import Keys, VQGANObjective

# The operations of sums, softmax, norms, distances, and losses. Activations (logistic, erf) and
# products are computed in bfloat16, and maxima are exact in any dtype.
SENSITIVE = {
    "reduce_sum", "argmin", "argmax", "cumsum", "exp", "exp2", "log", "log1p", "sqrt", "rsqrt",
    "square", "integer_pow",
}  # fmt: skip
PRODUCTS = ("conv_general_dilated", "dot_general")
BF16 = jnp.dtype("bfloat16")


def iterate_operations(value) -> Iterator:
    """Yields all operations of a jaxpr and of the jaxprs in it."""
    if hasattr(value, "eqns"):
        for operation in value.eqns:
            yield operation
            yield from iterate_operations(list(operation.params.values()))
    elif hasattr(value, "jaxpr"):
        yield from iterate_operations(value.jaxpr)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from iterate_operations(part)


def get_dtypes(operation, which="invars"):
    return {var.aval.dtype for var in getattr(operation, which)}


def trace_vqgan():
    config = load_config("mnist_tiny", {"dtype": "bfloat16", "vqgan.attention_resolutions": (14,)})
    model, images = build_vqgan(config), jnp.zeros((2, 28, 28, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.make_jaxpr(model.apply)(params, images)


def trace_discriminator():
    model, images = Discriminator(8, 2, dtype=BF16), jnp.zeros((2, 28, 28, 1))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return jax.make_jaxpr(lambda p, x: model.apply(p, x, mutable=["batch_stats"]))(params, images)


def trace_perceptual():
    images = jnp.zeros((2, 32, 32, 1))
    return jax.make_jaxpr(lambda *a: lpips(*a, dtype=BF16))(load_lpips(), images, images)


def trace_transformer(**options):
    model = GPT(16, 3, (3, 3), PriorConfig(layers=2, heads=2, width=16, **options), BF16)
    tokens = jnp.zeros((2, 9), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    keys = jnp.zeros((2, 2), jnp.uint32)
    return jax.make_jaxpr(lambda p, t: model.apply(p, t, keys))(params, tokens)


def trace_modern():
    return trace_transformer(norm="rms", mlp="swiglu", positions="rotary", qk_norm=True)


@pytest.mark.parametrize(
    "build", [trace_vqgan, trace_discriminator, trace_perceptual, trace_transformer, trace_modern]
)
def test_sensitive_operations_are_computed_in_float32(build):
    jaxpr = build()
    all_operations = list(iterate_operations(jaxpr))
    products = [op for op in all_operations if op.primitive.name in PRODUCTS]
    assert any(BF16 in get_dtypes(op) for op in products), "the networks compute in bfloat16"
    for op in all_operations:
        assert op.primitive.name not in SENSITIVE or BF16 not in get_dtypes(op), op
    outputs = {out.dtype for out in jaxpr.out_avals}
    assert outputs <= {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize(("build", "places"), [(trace_vqgan, 14 * 14), (trace_transformer, 9)])
def test_attention_scores_are_not_rounded_to_bfloat16(build, places):
    scores = [
        op
        for op in iterate_operations(build())
        if op.primitive.name == "dot_general" and op.outvars[0].aval.shape[-2:] == (places, places)
    ]
    assert scores and all(get_dtypes(op, "outvars") == {jnp.dtype("float32")} for op in scores)


def cosine(left, right):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (left, right))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def assert_float32(tree):
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} <= {"float32", "int32"}


def assert_near(gradient, expected, min_cosine, min_array_cosine):
    """Checks the cosine similarity of two gradients, which must be at least `min_cosine` for the
    whole gradient and `min_array_cosine` for every array with a significant norm. Also compares
    the norms of these arrays."""
    assert_float32(gradient)
    assert cosine(gradient, expected) >= min_cosine
    total_norm = optax.tree.norm(expected)
    pairs = zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True)
    for (path, array), other in pairs:
        norm = np.linalg.norm(other)
        if norm >= 1e-2 * total_norm:
            assert cosine(array, other) >= min_array_cosine, path
            assert np.linalg.norm(array) == pytest.approx(norm, rel=0.05), path


# The codebook has one code, because rounding could choose another code and change the image. The
# networks are small, so that they compile faster.
SMALL = {
    "vqgan.codebook_size": 1, "vqgan.channels": 64, "vqgan.multipliers": (1,),
    "vqgan.decoder_blocks": 1, "vqgan.lecam_weight": 1.0, "data.image_size": 12,
    "vqgan.adaptive_weight": True,
}  # fmt: skip
QUICKLY = {"xla_backend_optimization_level": 0}


def run_step(devices, function, state, arrays):
    """Runs a step on the devices and returns its result."""
    if len(devices) == 1:
        return devices.fetch(jax.jit(function, compiler_options=QUICKLY)(state, arrays))
    return devices.fetch(devices.compile(function)(devices.replicate(state), arrays))


on_devices = pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])


def make_stage_1(dtype, axis_name=None):
    """Returns the networks of stage 1 with a dtype, their state, and images."""
    networks = VQGANObjective.build(load_config("mnist_tiny", SMALL | {"dtype": dtype}), axis_name)
    keys = jax.random.split(jax.random.key(0), 3)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def create():
        images = jnp.tanh(2 * jax.random.normal(keys[0], (16, 12, 12, 1)))
        generator = networks.generator.init(keys[1], images)["params"]
        disc = networks.discriminator.init(keys[2], images, train=False)
        averages = {"real": jnp.float32(0.1), "fake": jnp.float32(-0.1)}
        extra = {"batch_stats": disc["batch_stats"], "lecam": averages}
        return (Net(generator, ()), Net(disc["params"], (), extra)), images

    return networks, *create()


@pytest.mark.slow
@on_devices
def test_the_gradients_of_stage_1_in_bfloat16_are_close_to_float32(count):
    exact = None
    for dtype, devices in (("float32", Devices(1)), ("bfloat16", Devices(count))):
        networks, nets, images = make_stage_1(dtype, devices.axis_name)

        def step(nets, x, networks=networks):
            return networks.compute_gradients(*nets, x, {}, True, 100)

        result = run_step(devices, step, nets, devices.shard(images))
        exact = exact or result
        assert_float32(result)
        assert_near(result.generator, exact.generator, 0.995, 0.99)
        for name in ("l1", "reconstruction_loss", "codebook", "generator_gradient", "loss"):
            assert result.metrics[name] == pytest.approx(exact.metrics[name], rel=0.03), name


@pytest.mark.slow
@on_devices
def test_the_gradients_of_the_discriminator_in_bfloat16_are_close_to_float32(count):
    """The images differ from each other, unlike reconstructions from one code."""
    exact = None
    for dtype, devices in (("float32", Devices(1)), ("bfloat16", Devices(count))):
        networks, (_, net), images = make_stage_1(dtype, devices.axis_name)

        def step(net, x, networks=networks):
            fake = -x[:, ::-1] / 2
            result = networks.forward_discriminator(
                net.params, net.extra, x, fake, jnp.int32(100), Keys()
            )
            return networks.mean((result.gradient, result.metrics)), result.extra

        (gradient, metrics), extra = run_step(devices, step, net, devices.shard(images))
        exact = exact or (gradient, metrics, extra)
        assert_float32((gradient, metrics, extra))
        assert_near(gradient, exact[0], 0.999, 0.99)


def make_stage_2(dtype, count=1):
    """Returns the devices, the function of a step of stage 2 with a dtype, a state, and a batch."""
    devices = Devices(count)
    overrides = {"prior.batch_size": 16, "prior.layers": 1, "dtype": dtype}
    config = load_config("mnist_tiny", overrides)
    model = GPT.build(config, 10)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, model.codebook_size, (64, model.length)).astype(np.uint8)
    feed = ResidentFeed(Split(codes, rng.integers(0, 10, 64).astype(np.int32)), 16, 0, devices)
    step = functools.partial(train_step, config, model, 100, devices.axis_name)
    return devices, step, init_transformer(config, model, jax.random.key(0)), feed.batch(0).arrays


@pytest.mark.slow
@on_devices
def test_the_gradients_of_stage_2_in_bfloat16_are_close_to_float32(count):
    exact = None
    for case in (("float32", 1), ("bfloat16", count)):
        state, metrics = run_step(*make_stage_2(*case))
        # Adam's first moment, which started at zero, is proportional to the gradient.
        gradient = optax.tree.get(state.nets["transformer"].opt_state, "mu")
        exact = exact or (gradient, metrics)
        assert_float32((state, metrics))
        assert_near(gradient, exact[0], 0.999, 0.99)
        nll, exact_nll = (x.unpack()[0]["nll"] for x in (metrics, exact[1]))
        assert nll == pytest.approx(exact_nll, rel=1e-3)


@pytest.fixture(scope="module")
def bfloat16_steps():
    """The jaxprs of a step of each stage, with attention and LPIPS in stage 1."""
    images = jnp.zeros((2, 16, 16, 1))
    settings = SMALL | {
        "dtype": "bfloat16", "data.image_size": 16, "vqgan.perceptual_weight": 1.0,
        "vqgan.attention_resolutions": (16,), "vqgan.multipliers": (1, 2),
    }  # fmt: skip
    networks = VQGANObjective.build(load_config("mnist_tiny", settings))

    def step(lpips_params, images):
        generator = networks.generator.init(jax.random.key(0), images)["params"]
        disc = networks.discriminator.init(jax.random.key(0), images, train=False)
        averages = {"real": jnp.float32(0.1), "fake": jnp.float32(-0.1)}
        extra = {"batch_stats": disc["batch_stats"], "lecam": averages}
        nets = Net(generator, ()), Net(disc["params"], (), extra)
        return networks.compute_gradients(*nets, images, lpips_params, True)

    _, prior_step, state, arrays = make_stage_2("bfloat16")
    return jax.make_jaxpr(step)(load_lpips(), images), jax.make_jaxpr(prior_step)(state, arrays)


def test_both_passes_of_a_step_multiply_in_bfloat16(bfloat16_steps):
    for jaxpr in bfloat16_steps:
        products = [op for op in iterate_operations(jaxpr) if op.primitive.name in PRODUCTS]
        assert len(products) > 10
        matrices = [op for op in products if op.outvars[0].aval.ndim]
        exact = [op for op in matrices if get_dtypes(op) != {BF16}]
        # Only the distances to the codes are products in float32, in the highest precision.
        assert all("HIGHEST" in str(op.params["precision"]) for op in exact), exact
        codes = SMALL["vqgan.codebook_size"]
        assert all(op.outvars[0].aval.shape[-1] == codes for op in exact), exact


def test_no_gradient_is_summed_in_bfloat16(bfloat16_steps):
    for jaxpr in bfloat16_steps:
        sums = [op for op in iterate_operations(jaxpr) if op.primitive.name == "reduce_sum"]
        # The gradient of a maximum over four values counts, exactly, how many are equal to it.
        sums = [op for op in sums if op.invars[0].aval.size > 4 * op.outvars[0].aval.size]
        assert sums and not any(BF16 in get_dtypes(op) for op in sums), sums
