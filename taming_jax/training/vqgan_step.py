"""The losses of stage 1 and their gradients.

The step runs the generator once forward and once back. What the image should become is collected
as cotangents of the reconstruction (perceptual and L1 in one, adversarial in the other); the
adaptive weight needs both only at the decoder's last kernel, one convolution away; then their
weighted sum is pulled back through the generator. The discriminator's forward pass on the
reconstruction serves both players, with a pullback for each.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from taming_jax import losses
from taming_jax.config.schema import Config, VQGANConfig
from taming_jax.data.augment import diff_augment
from taming_jax.data.batches import gather_batch
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.metrics.similarity import psnr
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.lpips import lpips
from taming_jax.models.quantizers import Noise
from taming_jax.models.vqgan import VQGAN, build_vqgan, reconstruct
from taming_jax.parallel.devices import maybe_pmean, maybe_psum
from taming_jax.training.accumulate import mean_over_parts
from taming_jax.training.state import Net, TrainState, ema_update


class Keys(NamedTuple):
    """Keys [b] each, where something draws: for what the discriminator sees of real and of fake
    images, and for their codes."""

    real: jax.Array | None = None
    fake: jax.Array | None = None
    codes: jax.Array | None = None


NO_KEYS = Keys()


class Gradients(NamedTuple):
    """What a step learns from a batch, averaged over the devices. `discriminator` and `extra` (its
    state afterwards) are None where the adversarial part is off."""

    generator: Any
    discriminator: Any
    extra: Any
    metrics: dict[str, jax.Array]


class Adversary(NamedTuple):
    """What the discriminator says: the generator's adversarial cotangent of the reconstruction,
    the gradient of the discriminator's own loss on this device, and its state afterwards."""

    cotangent: jax.Array
    gradient: Any
    extra: dict[str, Any]
    metrics: dict[str, jax.Array]


class GeneratorPass(NamedTuple):
    """The generator's forward pass: its reconstruction float32 [b,h,w,c], the input of its last
    convolution, the image losses' cotangent of the reconstruction, `vjp(cotangent of the
    reconstruction)` to the gradient of its parameters, in which the codebook loss is included, how
    often each code was used [k], and the losses."""

    reconstruction: jax.Array
    last: jax.Array
    cotangent: jax.Array
    vjp: Callable[[jax.Array], Any]
    counts: jax.Array
    metrics: dict[str, jax.Array]


@dataclass(frozen=True)
class VQGANObjective:
    """The networks and losses of stage 1 as one config sets them; `axis_name` is that of the
    devices."""

    settings: VQGANConfig
    generator: VQGAN
    discriminator: Discriminator
    dtype: Any
    axis_name: str | None = None

    @classmethod
    def build(cls, config: Config, axis_name: str | None = None) -> "VQGANObjective":
        settings, dtype = config.vqgan, jnp.dtype(config.dtype)
        discriminator = Discriminator(
            settings.discriminator_filters, settings.discriminator_layers, axis_name, dtype
        )
        return cls(settings, build_vqgan(config), discriminator, dtype, axis_name)

    def mean(self, tree: Any) -> Any:
        """Averages over the devices."""
        return maybe_pmean(tree, self.axis_name)

    def sum(self, tree: Any) -> Any:
        """Adds up over the devices."""
        return maybe_psum(tree, self.axis_name)

    def image_losses(
        self, images: jax.Array, reconstruction: jax.Array, lpips_params: Any
    ) -> dict[str, jax.Array]:
        """The losses between images float [b,h,w,c] in [-1, 1], each [b]. `reconstruction_loss` is
        their weighted sum; `l1` is reported for images in [0, 1]."""
        settings = self.settings
        difference = losses.l1(images, reconstruction)
        found = {"l1": difference / 2}
        loss = settings.l1_weight * difference
        if settings.perceptual_weight:
            found["perceptual"] = lpips(lpips_params, images, reconstruction, self.dtype)
            loss += settings.perceptual_weight * found["perceptual"]
        return found | {"reconstruction_loss": loss}

    def last_kernel_gradient(self, params: Any, last: jax.Array, cotangent: jax.Array) -> jax.Array:
        """The gradient at the decoder's last kernel from a cotangent of the reconstruction, given
        the input of that convolution, averaged over the devices."""

        def convolve(kernel: jax.Array) -> jax.Array:
            images = lax.conv_general_dilated(
                last, kernel.astype(last.dtype), (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            return images.astype(jnp.float32)

        _, pull = jax.vjp(convolve, params["decoder"]["conv_out"]["kernel"])
        return self.mean(pull(cotangent)[0])

    def discriminate(
        self, params: Any, stats: Any, images: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits in training mode, and the running statistics afterwards."""
        if keys is not None:
            images = diff_augment(images, keys, self.settings.diff_augment)
        logits, changed = self.discriminator.apply(
            {"params": params, "batch_stats": stats}, images, mutable=["batch_stats"]
        )
        return logits, changed["batch_stats"]

    def gradients(
        self,
        generator: Net,
        discriminator: Net,
        images: jax.Array,
        lpips_params: Any,
        adversarial: bool,
        discriminator_steps: jax.Array | int = 0,
        keys: Keys = NO_KEYS,
        temperature: jax.Array | float = 1.0,
    ) -> Gradients:
        """Every loss and gradient of one step on images float [b,h,w,c] in [-1, 1].

        `discriminator_steps` is how many steps the discriminator has taken (LeCAM's averages need
        it); `keys` are for what of it draws, codes at a `temperature`.

        With `micro_batches` the images are taken in as many parts, each with its own adaptive
        weight and BatchNorm statistics, and everything is averaged over them.
        """
        settings = self.settings
        step = functools.partial(
            self.micro_batch, generator.params, discriminator, lpips_params, adversarial,
            jnp.asarray(discriminator_steps, jnp.int32), jnp.asarray(temperature, jnp.float32),
        )  # fmt: skip
        found, counts = mean_over_parts(step, (images, keys), settings.micro_batches)
        gradient, learned, metrics = self.mean(
            (found.generator, found.discriminator, found.metrics)
        )
        metrics["perplexity"] = losses.perplexity(self.sum(counts))
        metrics["generator_gradient"] = optax.tree.norm(gradient)
        if adversarial:
            metrics["discriminator_gradient"] = optax.tree.norm(learned)
        return Gradients(gradient, learned, found.extra, metrics)

    def micro_batch(
        self,
        generator: Any,
        discriminator: Net,
        lpips_params: Any,
        adversarial: bool,
        discriminator_steps: jax.Array,
        temperature: jax.Array,
        arrays: tuple[jax.Array, Keys],
    ) -> tuple[Gradients, jax.Array]:
        """The gradients and losses of a part of a batch, images and keys, on this device; and how
        often it used each code [k]."""
        settings, (images, keys) = self.settings, arrays
        noise = None if keys.codes is None else Noise(keys.codes, temperature)
        forward = self.forward(generator, images, lpips_params, noise)
        cotangent, metrics = forward.cotangent, forward.metrics
        metrics["loss"] = (
            metrics["reconstruction_loss"] + settings.codebook_weight * metrics["codebook"]
        )
        if not adversarial:
            return Gradients(forward.vjp(cotangent), None, None, metrics), forward.counts
        adversary = self.adversary(
            discriminator.params, discriminator.extra, images, forward.reconstruction,
            discriminator_steps, keys,
        )  # fmt: skip
        metrics |= adversary.metrics
        weight = jnp.asarray(settings.discriminator_weight, jnp.float32)
        if settings.adaptive_weight:
            at_last_kernel = functools.partial(self.last_kernel_gradient, generator, forward.last)
            weight *= losses.adaptive_weight(
                at_last_kernel(cotangent), at_last_kernel(adversary.cotangent),
                settings.adaptive_weight_max,
            )  # fmt: skip
            metrics["adaptive_weight"] = weight
        metrics["loss"] += weight * metrics["adversarial"]
        gradient = forward.vjp(cotangent + weight * adversary.cotangent)
        found = Gradients(gradient, adversary.gradient, adversary.extra, metrics)
        return found, forward.counts

    def forward(
        self, params: Any, images: jax.Array, lpips_params: Any, noise: Noise | None = None
    ) -> GeneratorPass:
        """The generator's forward pass on images, and the losses between them and their
        reconstruction."""

        def generate(params: Any) -> tuple[Any, Any]:
            output, changed = self.generator.apply(
                {"params": params}, images, noise, mutable=["intermediates"]
            )
            last = changed["intermediates"]["decoder"]["last"][0]
            codebook = output.quantized.loss.mean()
            return (output.images, codebook), (output.quantized.indices, last)

        def image_loss(reconstruction: jax.Array) -> tuple[jax.Array, Any]:
            found = self.image_losses(images, reconstruction, lpips_params)
            means = {key: values.mean() for key, values in found.items()}
            return means["reconstruction_loss"], means

        (reconstruction, codebook), pullback, (indices, last) = jax.vjp(
            generate, params, has_aux=True
        )

        def vjp(cotangent: jax.Array) -> Any:
            codebook_weight = jnp.asarray(self.settings.codebook_weight, codebook.dtype)
            return pullback((cotangent, codebook_weight))[0]

        cotangent, metrics = jax.grad(image_loss, has_aux=True)(reconstruction)
        metrics |= {"codebook": codebook}
        return GeneratorPass(reconstruction, last, cotangent, vjp, self.counts(indices), metrics)

    def counts(self, indices: jax.Array, weight: jax.Array | float = 1.0) -> jax.Array:
        """How often each code was used on this device, float32 [k]; `weight` [b,1,1] counts an
        example for more or less than once."""
        one_hot = jax.nn.one_hot(indices, self.settings.codebook_size)
        return (one_hot * jnp.asarray(weight)[..., None]).sum((0, 1, 2))

    def adversary(
        self,
        params: Any,
        extra: dict[str, Any],
        images: jax.Array,
        reconstruction: jax.Array,
        updates: jax.Array,
        keys: Keys,
    ) -> Adversary:
        """The adversarial part: one forward pass on the reconstruction, one on the images. `extra`
        is the discriminator's state after `updates` steps."""
        settings, stats = self.settings, extra["batch_stats"]
        fake, pull_fake, stats = jax.vjp(
            lambda params, x: self.discriminate(params, stats, x, keys.fake),
            params, reconstruction, has_aux=True,
        )  # fmt: skip
        real, pull_real, stats = jax.vjp(
            lambda params: self.discriminate(params, stats, images, keys.real),
            params, has_aux=True,
        )  # fmt: skip
        extra = extra | {"batch_stats": stats}

        def generator_loss(fake: jax.Array) -> jax.Array:
            return losses.generator_adversarial(fake).mean()

        def discriminator_loss(real: jax.Array, fake: jax.Array) -> tuple[jax.Array, Any]:
            loss = losses.DISCRIMINATOR_LOSSES[settings.discriminator_loss](real, fake).mean()
            found = {"discriminator": loss}
            if settings.lecam_weight:
                held = losses.lecam(real, fake, averages["real"], averages["fake"]).mean()
                loss += settings.lecam_weight * held
                found["lecam"] = held
            return loss, found

        means = self.mean({"real": real.mean(), "fake": fake.mean()})
        if settings.lecam_weight:
            averages = ema_update(extra["lecam"], means, settings.lecam_decay, updates)
            extra["lecam"] = averages

        adversarial, for_generator = jax.value_and_grad(generator_loss)(fake)
        (for_real, for_fake), found = jax.grad(discriminator_loss, (0, 1), has_aux=True)(real, fake)
        gradient = jax.tree.map(jnp.add, pull_real(for_real)[0], pull_fake(for_fake)[0])
        metrics = found | {
            "adversarial": adversarial, "logits_real": means["real"], "logits_fake": means["fake"]
        }  # fmt: skip
        return Adversary(pull_fake(for_generator)[1], gradient, extra, metrics)

    def evaluate(
        self, state: TrainState, arrays: dict[str, jax.Array], lpips_params: Any, started: jax.Array
    ) -> dict[str, jax.Array]:
        """Sums over a batch, from which `summarise` makes the metrics of a whole split."""
        generator, discriminator = state.nets["generator"], state.nets["discriminator"]
        images, weight = to_float(gather_batch(arrays)[0]), arrays["weight"]
        output = reconstruct(self.generator, generator.eval_params, images)
        found = self.image_losses(images, output.images, lpips_params)
        found["codebook"] = losses.per_example(output.quantized.loss)
        originals, made = gather_batch(arrays)[0] / 255, to_uint8(output.images) / 255
        found["psnr"] = psnr(originals, made)
        variables = {
            "params": discriminator.params,
            "batch_stats": discriminator.extra["batch_stats"],
        }
        real, fake = (
            cast(jax.Array, self.discriminator.apply(variables, x, train=False))
            for x in (images, output.images)
        )
        adversarial = {
            "adversarial": losses.generator_adversarial(fake),
            "discriminator": losses.DISCRIMINATOR_LOSSES[self.settings.discriminator_loss](
                real, fake
            ),
        }
        sums = {key: (values * weight).sum() for key, values in found.items()}
        sums |= {key: started * (values * weight).sum() for key, values in adversarial.items()}
        sums |= {"examples": weight.sum(), "started": started * weight.sum()}
        sums["counts"] = self.counts(output.quantized.indices, weight[:, None, None])
        return self.sum(sums)
