"""Stage 1 with tiny networks that compile fast, for tests that do not need the real networks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from taming_jax.config.load import load_config
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.layers import conv
from taming_jax.models.quantizers import QUANTIZERS
from taming_jax.models.vqgan import VQGAN
from taming_jax.training.state import Net
from taming_jax.training.vqgan_step import VQGANObjective

QUICKLY = {"xla_backend_optimization_level": 0}  # fast compilation of programs that run once


class SmallEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Conv(6, (3, 3), strides=2, padding=1, name="conv_in")(x))


class SmallDecoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        h = nn.tanh(conv(8, 3, jnp.float32, "conv_in")(z.repeat(2, 1).repeat(2, 2)))
        self.sow("intermediates", "last", h)
        return conv(1, 3, jnp.float32, "conv_out")(h)


def make_small_networks(overrides, parts=1, axis_name=None):
    """Returns the networks and losses, by default with LeCam and an adaptive weight."""
    settings = {
        "lecam_weight": 0.5,
        "discriminator_weight": 0.7,
        "micro_batches": parts,
        "adaptive_weight": True,
    }
    config = load_config("mnist_tiny", {f"vqgan.{k}": v for k, v in (settings | overrides).items()})
    small = dataclasses.replace(config.vqgan, codebook_size=16, code_dim=4, latent_channels=6)
    quantizer = QUANTIZERS[small.quantizer](small, axis_name)
    generator = VQGAN(SmallEncoder(), quantizer, SmallDecoder(), small)
    discriminator = Discriminator(4, 1, axis_name)
    return VQGANObjective(small, generator, discriminator, jnp.float32, axis_name)


@functools.cache
def make_small_state():
    """Returns a generator, a discriminator, and images [16,12,12,1] for all small networks."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def create():
        networks = make_small_networks({})
        keys = jax.random.split(jax.random.key(0), 3)
        images = jnp.tanh(2 * jax.random.normal(keys[0], (16, 12, 12, 1)))
        params = networks.generator.init(keys[1], images)["params"]
        disc = networks.discriminator.init(keys[2], images, train=False)
        averages = {"real": jnp.float32(0.2), "fake": jnp.float32(-0.2)}
        extra = {"batch_stats": disc["batch_stats"], "lecam": averages}
        return Net(params, ()), Net(disc["params"], (), extra), images

    return create()
