"""A batch in parts: which examples are in one, what is added up, what it takes, and stage 1's step
against that of the whole batch and against its parts' losses written out."""

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
from tests.small_networks import QUICKLY, small_networks, small_state
from tests.training.test_vqgan_step import networks_and_state


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_part_holds_the_same_examples_on_any_number_of_devices(devices):
    places = np.arange(24).reshape(devices, -1)
    parts = np.stack([split_batch(own, 3) for own in places], 1)
    for number, part in enumerate(parts):
        assert sorted(part.ravel()) == list(range(number, 24, 3))


def test_the_mean_of_parts_is_that_of_what_each_returns():
    def function(arrays):
        values, keys = arrays
        assert keys is None
        return {"sum": values.sum(), "square": jnp.square(values.sum())}

    values = jnp.arange(1.0, 7.0)  # 1 + 4, 2 + 5 and 3 + 6
    means = jax.jit(lambda x: average_micro_batches(function, (x, None), 3))(values)
    assert means["sum"] == 7 and means["square"] == pytest.approx((25 + 49 + 81) / 3)
    assert average_micro_batches(function, (values, None), 1)["square"] == 441


def compiled(count, batch=32):
    """The compiled gradient of a few convolutions, of a batch in so many parts; its arguments."""
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


def test_parts_take_less_memory_and_on_a_cpu_no_loop():
    whole, arguments = compiled(1)
    parts, _ = compiled(4)
    golden.assert_close(4 * parts(*arguments), whole(*arguments), "gradient", 1e-5)
    assert " while(" not in parts.as_text(), "a convolution's gradient would be slow there"
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (whole, parts)]
    assert sizes[1] < 0.4 * sizes[0], sizes


@pytest.mark.slow
def test_an_autoencoders_gradients_in_four_parts_are_those_of_the_batch():
    networks, generator, discriminator, images = networks_and_state(
        {"vqgan.multipliers": (1,), "vqgan.decoder_blocks": 1}, 8
    )
    found = {}
    for parts in (1, 4):
        settings = dataclasses.replace(networks.settings, micro_batches=parts)
        gradients = dataclasses.replace(networks, settings=settings).compute_gradients
        step = jax.jit(gradients, static_argnums=4, compiler_options=QUICKLY)
        found[parts] = step(generator, discriminator, images, {}, False)
    assert found[4].discriminator is None and found[4].extra is None
    golden.assert_trees_close(found[4], found[1], "", 1e-5, 1e-6)


@pytest.fixture(scope="module")
def state_and_images():
    return small_state()


def learned(overrides, parts, count, adversarial, arguments):
    """What a step learns from (generator, discriminator, images, keys), in so many parts, on so
    many devices."""
    devices = Devices(count)
    networks = small_networks(overrides, parts, devices.axis_name)
    *nets, images, keys = arguments

    def gradients(nets, arrays):
        images, keys = arrays
        keys = jax.tree.map(jax.random.wrap_key_data, keys)
        return networks.compute_gradients(*nets, images, {}, adversarial, 100, keys, 0.8)

    arrays = images, jax.tree.map(jax.random.key_data, keys)
    step = devices.compile(gradients)
    return devices.fetch(step(devices.replicate(nets), devices.shard(arrays)))


def test_on_two_devices_four_parts_are_the_whole_batch_too(state_and_images):
    arguments = (*state_and_images, Keys())
    whole = learned({}, 1, 1, False, arguments)
    found = learned({}, 4, 2, False, arguments)
    golden.assert_trees_close(found, whole, "", 1e-5, 1e-6)


def test_codes_that_are_drawn_depend_on_the_image_alone(state_and_images):
    """Not on the parts or the devices; and on its key."""
    _, discriminator, images = state_and_images
    networks = small_networks({"quantizer": "gumbel"}, 1)
    params = jax.jit(networks.generator.init)(jax.random.key(3), images)["params"]
    keys = Keys(codes=jax.random.split(jax.random.key(4), len(images)))
    arguments = (Net(params, ()), discriminator, images, keys)
    whole = learned({"quantizer": "gumbel"}, 1, 1, False, arguments)
    found = learned({"quantizer": "gumbel"}, 2, 2, False, arguments)
    golden.assert_trees_close(found, whole, "", 1e-5, 1e-6)
    other = (*arguments[:-1], Keys(codes=jax.random.split(jax.random.key(5), len(images))))
    assert (
        learned({"quantizer": "gumbel"}, 1, 1, False, other).metrics["reconstruction_loss"]
        != whole.metrics["reconstruction_loss"]
    )


def by_parts(networks, generator, discriminator, images, keys, steps, count):
    """A step in parts, each with its own weight and statistics, with its losses written out: the
    means of their gradients, of the discriminator's state, and of the losses."""
    settings, before = networks.settings, discriminator.extra

    def losses_of(params, judge, x, keys):
        output = networks.generator.apply({"params": params}, x)
        fake, stats = networks.discriminate(judge, before["batch_stats"], output.images, keys.fake)
        real, stats = networks.discriminate(judge, stats, x, keys.real)
        means = {"real": real.mean(), "fake": fake.mean()}
        lecam = ema_update(before["lecam"], means, settings.lecam_decay, jnp.int32(steps))
        lecam = lax.stop_gradient(lecam)
        of_images = settings.l1_weight * jnp.abs(output.images - x).mean()
        of_images += settings.codebook_weight * output.quantized.loss.mean()
        hinge = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        held = jnp.square(jax.nn.relu(real - lecam["fake"])).mean()
        held += jnp.square(jax.nn.relu(lecam["real"] - fake)).mean()
        terms = of_images, -fake.mean(), hinge + settings.lecam_weight * held
        return terms, {"batch_stats": stats, "lecam": lecam}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def one(x, keys):
        def loss(number, params, judge):
            terms, after = losses_of(params, judge, x, keys)
            return terms[number], after

        arguments = generator.params, discriminator.params
        (of_images, by_images), (of_adversary, by_adversary), (_, learned) = (
            jax.value_and_grad(loss, i, has_aux=True)(number, *arguments)
            for number, i in ((0, 1), (1, 1), (2, 2))
        )
        weight = settings.discriminator_weight
        if settings.adaptive_weight:
            norms = [
                jnp.linalg.norm(gradient["decoder"]["conv_out"]["kernel"].ravel())
                for gradient in (by_images, by_adversary)
            ]
            weight *= norms[0] / (norms[1] + 1e-4)
        gradient = jax.tree.map(lambda x, y: x + weight * y, by_images, by_adversary)
        metrics = {"loss": of_images[0] + weight * of_adversary[0]}
        if settings.adaptive_weight:
            metrics["adaptive_weight"] = weight
        return gradient, learned, of_images[1], metrics

    found = [
        one(images[i::count], jax.tree.map(lambda key, i=i: key[i::count], keys))
        for i in range(count)
    ]
    return jax.tree.map(lambda *x: sum(x) / count, *found)


@pytest.mark.parametrize(
    ("overrides", "count", "unrolled"),
    [
        pytest.param({"diff_augment": ("translation",)}, 1, True, marks=pytest.mark.slow),
        ({"diff_augment": ("translation",)}, 2, False),
        ({"adaptive_weight": False}, 2, True),
    ],
    ids=["adaptive", "adaptive-in-a-loop", "fixed"],
)
def test_the_adversarial_part_in_two_parts_is_that_of_their_losses_written_out(
    overrides, count, unrolled, monkeypatch, state_and_images
):
    monkeypatch.setattr(accumulate, "should_unroll", lambda: unrolled)
    networks = small_networks(overrides, 2)
    *state, images = state_and_images
    keys = Keys()
    if networks.settings.diff_augment:
        keys = Keys(*(jax.random.split(jax.random.key(i), len(images)) for i in (5, 6)))
    gradient, of_discriminator, extra, metrics = by_parts(networks, *state, images, keys, 100, 2)
    found = learned(overrides, 2, count, True, (*state, images, keys))
    golden.assert_trees_close(found.generator, gradient, "generator ", 1e-5, 1e-6)
    golden.assert_trees_close(found.discriminator, of_discriminator, "discriminator ", 1e-5, 1e-6)
    golden.assert_trees_close(found.extra, extra, "state ", 1e-5, 1e-6)
    for name, value in metrics.items():
        golden.assert_close(found.metrics[name], value, name, 1e-5, 1e-6)
