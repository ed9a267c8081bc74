"""The losses of stage 1 and their gradients.

The step runs the generator once forward and once back. What the image should become is collected
as cotangents of the reconstruction (perceptual and L1 in one, adversarial in the other); the
adaptive weight needs both only at the decoder's last kernel, one convolution away; then their
weighted sum is pulled back through the generator. The discriminator's forward pass on the
reconstruction serves both players, with a pullback for each.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from taming_jax import losses
from taming_jax.config import Config, VQGANConfig
from taming_jax.data.augment import diff_augmented
from taming_jax.data.feeds import take, to_float
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.lpips import lpips
from taming_jax.models.vqgan import VQGAN, build_vqgan, reconstruct
from taming_jax.train.devices import averaged, summed
from taming_jax.train.state import Net, TrainState, moved


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


@dataclass(frozen=True)
class Networks:
    """The networks and losses of stage 1 as one config sets them; `axis_name` is that of the
    devices."""

    settings: VQGANConfig
    generator: VQGAN
    discriminator: Discriminator
    dtype: Any
    axis_name: str | None = None

    @classmethod
    def build(cls, config: Config, axis_name: str | None = None) -> "Networks":
        settings, dtype = config.vqgan, jnp.dtype(config.dtype)
        discriminator = Discriminator(
            settings.discriminator_filters, settings.discriminator_layers, axis_name, dtype
        )
        return cls(settings, build_vqgan(config), discriminator, dtype, axis_name)

    def mean(self, tree: Any) -> Any:
        """Averages over the devices."""
        return averaged(tree, self.axis_name)

    def sum(self, tree: Any) -> Any:
        """Adds up over the devices."""
        return summed(tree, self.axis_name)

    def image_losses(
        self, images: jax.Array, reconstruction: jax.Array, lpips_params: Any
    ) -> dict[str, jax.Array]:
        """The losses between images float [b,h,w,c] in [-1, 1], each [b]. `nll` is their weighted
        sum; `l1` is reported for images in [0, 1]."""
        settings = self.settings
        difference = losses.l1(images, reconstruction)
        found = {"l1": difference / 2}
        nll = settings.l1_weight * difference
        if settings.perceptual_weight:
            found["perceptual"] = lpips(lpips_params, images, reconstruction, self.dtype)
            nll += settings.perceptual_weight * found["perceptual"]
        return found | {"nll": nll}

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
            images = diff_augmented(images, keys, self.settings.diff_augment)
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
        keys: tuple[jax.Array, jax.Array] | None = None,
    ) -> Gradients:
        """Every loss and gradient of one step on images float [b,h,w,c] in [-1, 1].

        `discriminator_steps` is how many steps the discriminator has taken (LeCAM's averages need
        it); `keys` [b] each are for what the discriminator sees of the real and of the fake images,
        where that is augmented.
        """
        settings = self.settings

        def generate(params: Any) -> tuple[Any, Any]:
            output, changed = self.generator.apply(
                {"params": params}, images, mutable=["intermediates"]
            )
            last = changed["intermediates"]["decoder"]["last"][0]
            codebook = output.quantized.loss.mean()
            return (output.images, codebook), (output.quantized.indices, last)

        def image_loss(reconstruction: jax.Array) -> tuple[jax.Array, Any]:
            found = self.image_losses(images, reconstruction, lpips_params)
            means = {key: values.mean() for key, values in found.items()}
            return means["nll"], means

        (reconstruction, codebook), pull_generator, (indices, last) = jax.vjp(
            generate, generator.params, has_aux=True
        )
        cotangent, metrics = jax.grad(image_loss, has_aux=True)(reconstruction)
        metrics = metrics | {"codebook": codebook}
        discriminator_gradient, extra = None, None
        if adversarial:
            adversary = self.adversary(
                discriminator, images, reconstruction, discriminator_steps, keys
            )
            weight = jnp.asarray(settings.discriminator_weight, jnp.float32)
            if settings.adaptive_weight:
                weight *= losses.adaptive_weight(
                    self.last_kernel_gradient(generator.params, last, cotangent),
                    self.last_kernel_gradient(generator.params, last, adversary.cotangent),
                    settings.adaptive_weight_max,
                )
            cotangent += weight * adversary.cotangent
            metrics |= adversary.metrics | {"adaptive_weight": weight}
            discriminator_gradient = self.mean(adversary.gradient)
            extra = adversary.extra
        weight_of_codebook = jnp.asarray(settings.codebook_weight, codebook.dtype)
        gradient = self.mean(pull_generator((cotangent, weight_of_codebook))[0])

        metrics["loss"] = metrics["nll"] + settings.codebook_weight * codebook
        if adversarial:
            metrics["loss"] += metrics["adaptive_weight"] * metrics["adversarial"]
        metrics = self.mean(metrics)
        metrics["perplexity"] = losses.perplexity(self.counts(indices))
        metrics["generator_gradient"] = optax.tree.norm(gradient)
        if adversarial:
            metrics["discriminator_gradient"] = optax.tree.norm(discriminator_gradient)
        return Gradients(gradient, discriminator_gradient, extra, metrics)

    def counts(self, indices: jax.Array, weight: jax.Array | float = 1.0) -> jax.Array:
        """How often each code was used on all devices together, float32 [k]; `weight` [b,1,1]
        counts an example for more or less than once."""
        one_hot = jax.nn.one_hot(indices, self.settings.codebook_size)
        return self.sum((one_hot * jnp.asarray(weight)[..., None]).sum((0, 1, 2)))

    def adversary(
        self,
        net: Net,
        images: jax.Array,
        reconstruction: jax.Array,
        steps: jax.Array | int,
        keys: tuple[jax.Array, jax.Array] | None,
    ) -> Adversary:
        """The adversarial part: one forward pass on the reconstruction, one on the images."""
        settings, stats = self.settings, net.extra["batch_stats"]
        for_real_images, for_fake_images = keys or (None, None)

        fake, pull_fake, stats = jax.vjp(
            lambda params, x: self.discriminate(params, stats, x, for_fake_images),
            net.params, reconstruction, has_aux=True,
        )  # fmt: skip
        real, pull_real, stats = jax.vjp(
            lambda params: self.discriminate(params, stats, images, for_real_images),
            net.params, has_aux=True,
        )  # fmt: skip
        extra = {"batch_stats": stats}

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
            averages = moved(net.extra["lecam"], means, settings.lecam_decay, jnp.asarray(steps))
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
        images, weight = to_float(take(arrays)[0]), arrays["weight"]
        output = reconstruct(self.generator, generator.chosen, images)
        found = self.image_losses(images, output.images, lpips_params)
        found["codebook"] = losses.per_example(output.quantized.loss)
        squares = losses.per_example(jnp.square(jnp.clip(output.images, -1, 1) - images)) / 4
        found["psnr"] = -10 * jnp.log10(jnp.maximum(squares, 1e-10))
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
        return self.sum(sums) | {
            "counts": self.counts(output.quantized.indices, weight[:, None, None])
        }
