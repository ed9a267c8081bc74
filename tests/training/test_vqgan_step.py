"""Compares the step of stage 1 with the recorded official step and with a plain implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.data.augment import diff_augment
from taming_jax.interop.compvis import build_discriminator_layout, build_vqgan_layout
from taming_jax.models.lpips import load_lpips
from taming_jax.models.vqgan import reconstruct
from taming_jax.training import vqgan_step
from taming_jax.training.state import Net, TrainState
from taming_jax.training.vqgan_step import Keys, VQGANObjective
from tests import golden
from tests.plain_step import ONES, compute_plain_gradients
from tests.small_networks import make_small_networks, make_small_state

OFFICIAL = {
    "data.image_size": 32, "data.channels": 3, "vqgan.channels": 32, "vqgan.multipliers": (1, 2),
    "vqgan.blocks": 1, "vqgan.decoder_blocks": None, "vqgan.attention_resolutions": (16,),
    "vqgan.latent_channels": 16, "vqgan.code_dim": 8, "vqgan.codebook_size": 32,
    "vqgan.vq.commitment": 0.25, "vqgan.discriminator_filters": 16, "vqgan.discriminator_layers": 2,
    "vqgan.discriminator_weight": 0.8, "vqgan.adaptive_weight": True,
}  # fmt: skip


def test_the_step_reproduces_the_official_training_step():
    recorded = golden.load("compvis_losses")
    networks = VQGANObjective.build(load_config("mnist", OFFICIAL))
    images = golden.to_nhwc(recorded["x"])

    def convert_generator(state_dict):
        ours = jax.eval_shape(networks.generator.init, jax.random.key(0), images)["params"]
        return golden.convert_state_dict(build_vqgan_layout, ours, state_dict)

    def convert_discriminator(state_dict):
        ours = jax.eval_shape(lambda x: networks.discriminator.init(jax.random.key(0), x), images)
        return golden.convert_state_dict(build_discriminator_layout, ours, state_dict)

    discriminator_arrays = golden.drop_counts(golden.select_prefix(recorded, "disc/"))
    variables = convert_discriminator(discriminator_arrays)
    generator = Net(convert_generator(golden.select_prefix(recorded, "sd/")), ())
    discriminator = Net(variables["params"], (), {"batch_stats": variables["batch_stats"]})

    output = networks.generator.apply({"params": generator.params}, images)
    np.testing.assert_array_equal(output.quantized.indices, recorded["indices"])
    golden.assert_close(output.images, golden.to_nhwc(recorded["reconstruction"]), "reconstruction")

    result = jax.jit(networks.compute_gradients, static_argnums=4)(
        generator, discriminator, images, load_lpips(), True
    )
    scalars = golden.select_prefix(recorded, "scalar/")
    ours = {
        "total_loss": "loss", "quant_loss": "codebook", "nll_loss": "reconstruction_loss",
        "p_loss": "perceptual",
        "g_loss": "adversarial", "d_weight": "adaptive_weight", "disc_loss": "discriminator",
        "logits_real": "logits_real", "logits_fake": "logits_fake",
    }  # fmt: skip
    for official, name in ours.items():
        golden.assert_close(result.metrics[name], scalars[official], official)
    expected = convert_generator(golden.select_prefix(recorded, "grad/"))
    golden.assert_trees_close(result.generator, expected, "generator gradient ")
    discriminator_arrays |= golden.select_prefix(recorded, "disc_grad/")
    expected = convert_discriminator(discriminator_arrays)["params"]
    golden.assert_trees_close(result.discriminator, expected, "discriminator gradient ")


def make_networks_and_state(overrides, batch=4):
    """Returns networks with parameters, and images.

    The networks are not too small. With one channel per group (8 or 16 channels here), GroupNorm
    makes the gradient of the preceding bias zero in theory, so that only rounding remains."""
    sizes = {
        "vqgan.channels": 64, "vqgan.multipliers": (1, 2), "vqgan.adaptive_weight": True,
    }  # fmt: skip
    config = load_config("mnist_tiny", sizes | overrides)
    networks = VQGANObjective.build(config)
    keys = jax.random.split(jax.random.key(0), 4)
    images = jnp.tanh(2 * jax.random.normal(keys[0], (batch, 28, 28, 1)))
    quickly = {"xla_backend_optimization_level": 0}  # fast compilation of programs that run once
    params = jax.jit(networks.generator.init, compiler_options=quickly)(keys[1], images)["params"]
    disc = jax.jit(networks.discriminator.init, static_argnames="train", compiler_options=quickly)(
        keys[2], images, train=False
    )
    extra = {"batch_stats": disc["batch_stats"]}
    return networks, Net(params, ()), Net(disc["params"], (), extra), images


@pytest.mark.slow
def test_the_step_equals_the_plain_step_with_perceptual_loss_and_adaptive_weight():
    networks, *state, images = make_networks_and_state({"vqgan.perceptual_weight": 1.0})
    assert_equals_the_plain_step(networks, *state, images, load_lpips())


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_step_equals_the_plain_step(adaptive):
    networks = make_small_networks({
        "discriminator_loss": "vanilla", "vq.l2_normalise": False, "adaptive_weight": adaptive,
        "codebook_weight": 0.5, "l1_weight": 2.0, "lecam_weight": 0.0,
    })  # fmt: skip
    assert_equals_the_plain_step(networks, *make_small_state(), {})


def assert_equals_the_plain_step(networks, generator, discriminator, images, params):
    result = jax.jit(networks.compute_gradients, static_argnums=4)(
        generator, discriminator, images, params, True
    )
    gradient, discriminator_gradient, losses = jax.jit(compute_plain_gradients, static_argnums=0)(
        networks, generator, discriminator, images, params, ONES
    )
    golden.assert_trees_close(result.generator, gradient, "generator ", 1e-5, 1e-7)
    golden.assert_trees_close(
        result.discriminator, discriminator_gradient, "discriminator ", 1e-5, 1e-7
    )
    names = {"l1", "reconstruction_loss", "codebook", "loss", "adversarial", "discriminator"}
    assert ("adaptive_weight" in result.metrics) == networks.settings.adaptive_weight
    if networks.settings.adaptive_weight:
        names.add("adaptive_weight")
    if networks.settings.perceptual_weight:
        names.add("perceptual")
    for name in names:
        golden.assert_close(result.metrics[name], losses[name], name, 1e-5, 1e-7)


@pytest.mark.slow
def test_the_step_needs_at_most_four_fifths_of_the_flops_of_the_plain_step():
    config = load_config("mnist", {"vqgan.adaptive_weight": True})
    networks = VQGANObjective.build(config)
    images = jax.ShapeDtypeStruct((64, 28, 28, 1), jnp.float32)

    def create():
        key = jax.random.key(0)
        disc = networks.discriminator.init(key, jnp.zeros(images.shape), train=False)
        generator = Net(networks.generator.init(key, jnp.zeros(images.shape))["params"], ())
        return generator, Net(disc["params"], (), {"batch_stats": disc["batch_stats"]})

    arguments = (*jax.eval_shape(create), images, jax.eval_shape(load_lpips_arrays))
    ours = jax.jit(networks.compute_gradients, static_argnums=4).lower(*arguments, True)
    # The official code even evaluates LPIPS twice per step, which is not counted here.
    plain = jax.jit(compute_plain_gradients, static_argnums=(0, 6)).lower(
        networks, *arguments, ONES, False
    )
    flops = [lowered.compile().cost_analysis()["flops"] for lowered in (ours, plain)]
    assert flops[0] <= 0.8 * flops[1], f"{flops[0] / flops[1]:.3f}"


def load_lpips_arrays():
    return jax.tree.map(jnp.asarray, load_lpips())


def test_psnr_is_computed_from_images_rounded_to_eight_bits(monkeypatch):
    """Evaluations do the same. Rounding removes small differences, and the PSNR of equal images is
    100."""
    networks, (generator, discriminator, images) = make_small_networks({}), make_small_state()
    pixels = np.rint((np.asarray(images[:4]) + 1) * 127.5).astype(np.uint8)
    offsets = np.array([0.0, 0.003, 0.02, 0.3], np.float32).reshape(4, 1, 1, 1)

    def reconstruct_by_offset(model, params, x):
        return reconstruct(model, params, x)._replace(images=x + offsets)

    monkeypatch.setattr(vqgan_step, "reconstruct", reconstruct_by_offset)
    state = TrainState(jnp.int32(0), {"generator": generator, "discriminator": discriminator})
    for i in range(4):
        weight = np.eye(4, dtype=np.float32)[i]
        arrays = {"images": pixels, "labels": np.zeros(4, np.int32), "weight": weight}
        sums = jax.jit(networks.evaluate)(state, arrays, {}, jnp.float32(0))
        reconstructed = np.clip(pixels[i] / 127.5 - 1 + offsets[i], -1, 1)
        error = np.square((np.rint((reconstructed + 1) * 127.5) - pixels[i]) / 255).mean()
        expected = 100 if i < 2 else -10 * np.log10(error)
        assert sums["psnr"] == pytest.approx(expected, rel=1e-3)


def test_lecam_keeps_logits_near_the_average_of_the_other_kind():
    networks, (generator, discriminator, images) = make_small_networks({}), make_small_state()
    zeros = {"real": jnp.float32(0.0), "fake": jnp.float32(0.0)}
    discriminator = discriminator.replace(extra=discriminator.extra | {"lecam": zeros})
    result = jax.jit(networks.compute_gradients, static_argnums=4)(
        generator, discriminator, images, {}, True, jnp.int32(0)
    )
    # The first update of a moving average keeps a tenth of the old value.
    averages = {k: 0.9 * result.metrics[f"logits_{k}"] for k in ("real", "fake")}
    golden.assert_trees_close(result.extra["lecam"], averages, "averages ", 1e-5)

    forward = jax.jit(networks.generator.apply)
    reconstruction = forward({"params": generator.params}, images).images

    def loss(params):
        stats = discriminator.extra["batch_stats"]
        real, fake = (networks.discriminate(params, stats, x)[0] for x in (images, reconstruction))
        hinge = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        up = jax.nn.relu(real - averages["fake"]) ** 2
        down = jax.nn.relu(averages["real"] - fake) ** 2
        return hinge + 0.5 * (up.mean() + down.mean())

    golden.assert_trees_close(
        result.discriminator, jax.jit(jax.grad(loss))(discriminator.params), "gradient ", 1e-5, 1e-7
    )


def test_before_its_start_the_discriminator_is_neither_used_nor_trained():
    networks, (generator, discriminator, images) = make_small_networks({}), make_small_state()
    result = jax.jit(networks.compute_gradients, static_argnums=4)(
        generator, discriminator, images, {}, False
    )
    assert result.discriminator is None and result.extra is None
    assert "adversarial" not in result.metrics

    def autoencoder_loss(params):
        output = networks.generator.apply({"params": params}, images)
        return jnp.abs(output.images - images).mean() + output.quantized.loss.mean()

    gradient = jax.jit(jax.grad(autoencoder_loss))(generator.params)
    golden.assert_trees_close(result.generator, gradient, "gradient ", 1e-5, 1e-7)


def test_gradients_pass_through_the_augmentation_of_the_discriminator_inputs():
    """Compares with the gradients of the losses written out, with the same augmentation."""
    kinds = ("color", "translation", "cutout")
    settings = {"diff_augment": kinds, "adaptive_weight": False, "lecam_weight": 0.0}
    networks, (generator, discriminator, images) = make_small_networks(settings), make_small_state()
    keys = Keys(*(jax.random.split(jax.random.key(i), len(images)) for i in (5, 6)))
    result = jax.jit(networks.compute_gradients, static_argnums=4)(
        generator, discriminator, images, {}, True, 0, keys
    )
    stats = discriminator.extra["batch_stats"]

    def logits(params, x, keys):
        return networks.discriminate(params, stats, diff_augment(x, keys, kinds))[0]

    def generator_loss(params):
        output = networks.generator.apply({"params": params}, images)
        adversarial = -logits(discriminator.params, output.images, keys[1]).mean()
        nll = jnp.abs(output.images - images).mean() + output.quantized.loss.mean()
        return nll + networks.settings.discriminator_weight * adversarial, output.images

    expected, reconstruction = jax.jit(jax.grad(generator_loss, has_aux=True))(generator.params)
    golden.assert_trees_close(result.generator, expected, "gradient ", 1e-5, 1e-7)

    def discriminator_loss(params):
        real, fake = logits(params, images, keys[0]), logits(params, reconstruction, keys[1])
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

    expected = jax.jit(jax.grad(discriminator_loss))(discriminator.params)
    golden.assert_trees_close(result.discriminator, expected, "gradient ", 1e-5, 1e-7)
