"""Tests of micro-batches: which examples they contain, how they are averaged, and their memory.

They also compare the step of stage 1 in micro-batches with the step on the whole batch, and with
the losses of the micro-batches written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from taming_jax.parallel.devices import Devices
from taming_jax.training import accumulate
from taming_jax.training.accumulate import average_micro_batches, split_batch
from taming_jax.training.state import Net, ema_update
from taming_jax.training.vqgan_step import Keys
from tests import golden
from tests.small_networks import QUICKLY, make_small_networks, make_small_state
from tests.training.test_vqgan_step import make_networks_and_state


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_micro_batch_has_the_same_examples_on_any_number_of_devices(devices):
    indices = np.arange(24).reshape(devices, -1)
    micro_batches = np.stack([split_batch(device_indices, 3) for device_indices in indices], 1)
    for start, micro_batch in enumerate(micro_batches):
        assert sorted(micro_batch.ravel()) == list(range(start, 24, 3))


def test_the_results_of_micro_batches_are_averaged():
    def function(arrays):
        values, keys = arrays
        assert keys is None
        return {"sum": values.sum(), "square": jnp.square(values.sum())}

    values = jnp.arange(1.0, 7.0)  # The micro-batches sum to 1 + 4, 2 + 5, and 3 + 6.
    means = jax.jit(lambda x: average_micro_batches(function, (x, None), 3))(values)
    assert means["sum"] == 7 and means["square"] == pytest.approx((25 + 49 + 81) / 3)
    assert average_micro_batches(function, (values, None), 1)["square"] == 441


def compile_gradient(count, batch=32):
    """Returns a compiled gradient of a few convolutions in `count` micro-batches, and its
    arguments."""
    kernels = 0.2 * jax.random.normal(jax.random.key(0), (4, 3, 3, 8, 8))
    images = jax.random.normal(jax.random.key(1), (batch, 16, 16, 8))

    def loss(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(
                lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return jnp.square(x).sum()

    def gradient(kernels, images):
        return average_micro_batches(lambda x: jax.grad(loss)(kernels, x), images, count)

    return jax.jit(gradient).lower(kernels, images).compile(), (kernels, images)


def test_micro_batches_need_less_memory_and_no_loop_on_a_cpu():
    plain, arguments = compile_gradient(1)
    accumulated, _ = compile_gradient(4)
    golden.assert_close(4 * accumulated(*arguments), plain(*arguments), "gradient", 1e-5)
    assert " while(" not in accumulated.as_text(), "the gradient of a convolution is slow in a loop"
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (plain, accumulated)]
    assert sizes[1] < 0.4 * sizes[0], sizes


@pytest.mark.slow
def test_the_autoencoders_gradients_in_four_micro_batches_are_those_of_the_batch():
    networks, generator, discriminator, images = make_networks_and_state(
        {"vqgan.multipliers": (1,), "vqgan.decoder_blocks": 1}, 8
    )
    results = {}
    for parts in (1, 4):
        settings = dataclasses.replace(networks.settings, micro_batches=parts)
        gradients = dataclasses.replace(networks, settings=settings).compute_gradients
        step = jax.jit(gradients, static_argnums=4, compiler_options=QUICKLY)
        results[parts] = step(generator, discriminator, images, {}, False)
    assert results[4].discriminator is None and results[4].extra is None
    golden.assert_trees_close(results[4], results[1], "", 1e-5, 1e-6)


@pytest.fixture(scope="module")
def state_and_images():
    return make_small_state()


def compute_step(overrides, parts, count, adversarial, arguments):
    """Returns what a step on `count` devices computes from (generator, discriminator, images, keys)
    in `parts` micro-batches."""
    devices = Devices(count)
    networks = make_small_networks(overrides, parts, devices.axis_name)
    *nets, images, keys = arguments

    def gradients(nets, arrays):
        images, keys, place = arrays
        keys = jax.tree.map(jax.random.wrap_key_data, keys)._replace(place=place)
        return networks.compute_gradients(
            *nets, images, {}, adversarial, 100, keys, jax.random.key(6), 0.3
        )

    arrays = images, jax.tree.map(jax.random.key_data, keys), jnp.arange(len(images))
    step = devices.compile(gradients)
    return devices.fetch(step(devices.replicate(nets), devices.shard(arrays)))


def test_four_micro_batches_on_two_devices_equal_the_whole_batch(state_and_images):
    arguments = (*state_and_images, Keys())
    expected = compute_step({}, 1, 1, False, arguments)
    result = compute_step({}, 4, 2, False, arguments)
    golden.assert_trees_close(result, expected, "", 1e-5, 1e-6)


def test_random_codes_depend_only_on_the_image_and_its_key(state_and_images):
    """They depend on neither the micro-batches nor the devices."""
    _, discriminator, images = state_and_images
    networks = make_small_networks({"quantizer": "gumbel"}, 1)
    params = jax.jit(networks.generator.init)(jax.random.key(3), images)["params"]
    keys = Keys(codes=jax.random.split(jax.random.key(4), len(images)))
    arguments = (Net(params, ()), discriminator, images, keys)
    expected = compute_step({"quantizer": "gumbel"}, 1, 1, False, arguments)
    result = compute_step({"quantizer": "gumbel"}, 2, 2, False, arguments)
    golden.assert_trees_close(result, expected, "", 1e-5, 1e-6)
    other_keys = Keys(codes=jax.random.split(jax.random.key(5), len(images)))
    other = compute_step({"quantizer": "gumbel"}, 1, 1, False, (*arguments[:-1], other_keys))
    assert other.metrics["reconstruction_loss"] != expected.metrics["reconstruction_loss"]


def average_written_out_steps(networks, generator, discriminator, images, keys, steps, count):
    """Takes a step in `count` micro-batches, with their losses written out.

    Each micro-batch has its own adaptive weight and statistics. Returns the means of the gradients
    of the generator and the discriminator, of the discriminator's state, and of the losses."""
    settings, before = networks.settings, discriminator.extra

    def compute_losses(params, judge, x, keys):
        output = networks.generator.apply({"params": params}, x)
        fake, stats = networks.discriminate(judge, before["batch_stats"], output.images, keys.fake)
        real, stats = networks.discriminate(judge, stats, x, keys.real)
        means = {"real": real.mean(), "fake": fake.mean()}
        lecam = ema_update(before["lecam"], means, settings.lecam_decay, jnp.int32(steps))
        lecam = lax.stop_gradient(lecam)
        image_loss = settings.l1_weight * jnp.abs(output.images - x).mean()
        image_loss += settings.codebook_weight * output.quantized.loss.mean()
        hinge = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        lecam_loss = jnp.square(jax.nn.relu(real - lecam["fake"])).mean()
        lecam_loss += jnp.square(jax.nn.relu(lecam["real"] - fake)).mean()
        terms = image_loss, -fake.mean(), hinge + settings.lecam_weight * lecam_loss
        return terms, {"batch_stats": stats, "lecam": lecam}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step_micro_batch(x, keys):
        def loss(number, params, judge):
            terms, after = compute_losses(params, judge, x, keys)
            return terms[number], after

        arguments = generator.params, discriminator.params
        (
            (image_loss, image_gradient),
            (adversarial_loss, adversarial_gradient),
            (_, judge_gradient),
        ) = (
            jax.value_and_grad(loss, i, has_aux=True)(number, *arguments)
            for number, i in ((0, 1), (1, 1), (2, 2))
        )
        weight = settings.discriminator_weight
        if settings.adaptive_weight:
            norms = [
                jnp.linalg.norm(gradient["decoder"]["conv_out"]["kernel"].ravel())
                for gradient in (image_gradient, adversarial_gradient)
            ]
            weight *= norms[0] / (norms[1] + 1e-4)
        gradient = jax.tree.map(lambda x, y: x + weight * y, image_gradient, adversarial_gradient)
        metrics = {"loss": image_loss[0] + weight * adversarial_loss[0]}
        if settings.adaptive_weight:
            metrics["adaptive_weight"] = weight
        return gradient, judge_gradient, image_loss[1], metrics

    results = [
        step_micro_batch(images[i::count], jax.tree.map(lambda key, i=i: key[i::count], keys))
        for i in range(count)
    ]
    return jax.tree.map(lambda *x: sum(x) / count, *results)


@pytest.mark.parametrize(
    ("overrides", "count", "unrolled"),
    [
        pytest.param({"diff_augment": ("translation",)}, 1, True, marks=pytest.mark.slow),
        ({"diff_augment": ("translation",)}, 2, False),
        pytest.param({"adaptive_weight": False}, 2, True, marks=pytest.mark.slow),
    ],
    ids=["adaptive", "adaptive-in-a-loop", "fixed"],
)
def test_the_adversarial_step_in_two_micro_batches_equals_the_written_out_step(
    overrides, count, unrolled, monkeypatch, state_and_images
):
    monkeypatch.setattr(accumulate, "should_unroll", lambda: unrolled)
    networks = make_small_networks(overrides, 2)
    *state, images = state_and_images
    keys = Keys()
    if networks.settings.diff_augment:
        keys = Keys(*(jax.random.split(jax.random.key(i), len(images)) for i in (5, 6)))
    gradient, discriminator_gradient, extra, metrics = average_written_out_steps(
        networks, *state, images, keys, 100, 2
    )
    result = compute_step(overrides, 2, count, True, (*state, images, keys))
    golden.assert_trees_close(result.generator, gradient, "generator ", 1e-5, 1e-6)
    golden.assert_trees_close(
        result.discriminator, discriminator_gradient, "discriminator ", 1e-5, 1e-6
    )
    golden.assert_trees_close(result.extra, extra, "state ", 1e-5, 1e-6)
    for name, value in metrics.items():
        golden.assert_close(result.metrics[name], value, name, 1e-5, 1e-6)
