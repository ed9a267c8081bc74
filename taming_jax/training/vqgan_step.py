"""The losses of stage 1 and their gradients.

The step runs one forward pass and one backward pass of the generator. The gradients of the losses
are first taken with respect to the reconstruction: one cotangent for the perceptual and L1 losses,
and one for the adversarial loss. The adaptive weight needs gradients only at the decoder's last
kernel, which follow from the cotangents through a single convolution. The weighted sum of the
cotangents is then pulled back through the generator. The generator's and the discriminator's
adversarial losses share the discriminator's forward pass on the reconstruction.
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
from taming_jax.models.quantizers import Training
from taming_jax.models.vqgan import VQGAN, build_vqgan, reconstruct
from taming_jax.parallel.devices import maybe_pmean, maybe_psum
from taming_jax.training.accumulate import average_micro_batches
from taming_jax.training.state import Net, TrainState, ema_update


class Keys(NamedTuple):
    """One random key per example [b] for each use of randomness, or None if there is none:
    augmentation of the discriminator's real and fake images, and sampling of codes. `place` int32
    [b] is the position of each example in the global batch."""

    real: jax.Array | None = None
    fake: jax.Array | None = None
    codes: jax.Array | None = None
    place: jax.Array | None = None


NO_KEYS = Keys()


class Gradients(NamedTuple):
    """The gradients and metrics of a step, averaged over the devices, or of a micro-batch on one
    device. `extra` is the new extra state of the discriminator. `discriminator` and `extra` are
    None before the discriminator starts. `statistics` are the quantizer's, summed over the batch or
    micro-batch, and `counts` [k], how often each code was used."""

    generator: Any
    discriminator: Any
    extra: Any
    metrics: dict[str, jax.Array]
    statistics: dict[str, jax.Array]


class DiscriminatorPass(NamedTuple):
    """The discriminator's pass on this device. `cotangent` is the gradient of the adversarial loss
    with respect to the reconstruction, `gradient` is that of the discriminator's own loss, and
    `extra` is the discriminator's new extra state."""

    cotangent: jax.Array
    gradient: Any
    extra: dict[str, Any]
    metrics: dict[str, jax.Array]


class GeneratorPass(NamedTuple):
    """The generator's forward pass.

    `reconstruction` is float32 [b,h,w,c]; `last` is the input of the decoder's last convolution;
    `cotangent` is the gradient of `reconstruction_loss` with respect to the reconstruction; `vjp`
    maps a cotangent of the reconstruction to the gradient of the parameters, including that of the
    quantizer's loss; `statistics` are as in `Gradients`; `metrics` holds the losses.
    """

    reconstruction: jax.Array
    last: jax.Array
    cotangent: jax.Array
    vjp: Callable[[jax.Array], Any]
    statistics: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


@dataclass(frozen=True)
class VQGANObjective:
    """The networks and losses of stage 1. `axis_name` is the mapped axis of devices, or None."""

    settings: VQGANConfig
    generator: VQGAN
    discriminator: Discriminator
    dtype: Any
    axis_name: str | None = None

    @classmethod
    def build(cls, config: Config, axis_name: str | None = None) -> "VQGANObjective":
        settings, generator = config.vqgan, build_vqgan(config, axis_name)
        discriminator = Discriminator(
            settings.discriminator_filters, settings.discriminator_layers, axis_name,
            generator.dtype,
        )  # fmt: skip
        return cls(settings, generator, discriminator, generator.dtype, axis_name)

    def mean(self, tree: Any) -> Any:
        """Averages over the devices."""
        return maybe_pmean(tree, self.axis_name)

    def sum(self, tree: Any) -> Any:
        """Sums over the devices."""
        return maybe_psum(tree, self.axis_name)

    def compute_image_losses(
        self, images: jax.Array, reconstruction: jax.Array, lpips_params: Any
    ) -> dict[str, jax.Array]:
        """Returns the losses [b] between images float [b,h,w,c] in [-1, 1] and reconstructions.
        `reconstruction_loss` is their weighted sum. `l1` is reported for images in [0, 1]."""
        settings = self.settings
        difference = losses.l1(images, reconstruction)
        terms = {"l1": difference / 2}
        loss = settings.l1_weight * difference
        if settings.perceptual_weight:
            terms["perceptual"] = lpips(lpips_params, images, reconstruction, self.dtype)
            loss += settings.perceptual_weight * terms["perceptual"]
        return terms | {"reconstruction_loss": loss}

    def compute_last_kernel_gradient(
        self, params: Any, last: jax.Array, cotangent: jax.Array
    ) -> jax.Array:
        """Returns the gradient at the decoder's last kernel, averaged over the devices, from the
        input of the last convolution and a cotangent of the reconstruction."""

        def convolve(kernel: jax.Array) -> jax.Array:
            images = lax.conv_general_dilated(
                last, kernel.astype(last.dtype), (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            return images.astype(jnp.float32)

        _, pullback = jax.vjp(convolve, params["decoder"]["conv_out"]["kernel"])
        return self.mean(pullback(cotangent)[0])

    def discriminate(
        self, params: Any, stats: Any, images: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the logits [b,h,w,1] in training mode and the updated running statistics."""
        if keys is not None:
            images = diff_augment(images, keys, self.settings.diff_augment)
        logits, updates = self.discriminator.apply(
            {"params": params, "batch_stats": stats}, images, mutable=["batch_stats"]
        )
        return logits, updates["batch_stats"]

    def compute_gradients(
        self,
        generator: Net,
        discriminator: Net,
        images: jax.Array,
        lpips_params: Any,
        adversarial: bool,
        discriminator_steps: jax.Array | int = 0,
        keys: Keys = NO_KEYS,
        step_key: jax.Array | None = None,
        progress: jax.Array | float = 0.0,
    ) -> Gradients:
        """Returns all losses and gradients of one step on images float [b,h,w,c] in [-1, 1].

        `discriminator_steps` is the number of steps since the discriminator started, which LeCam's
        averages need. `keys` and `step_key` are random keys, of the examples and of the step, and
        `progress` is the fraction of the run that is done. Without keys for the codes, the
        quantizer works as in evaluation.

        With the setting `micro_batches`, each micro-batch has its own adaptive weight and BatchNorm
        statistics, and the results are averaged.
        """
        settings = self.settings
        step = functools.partial(
            self.compute_micro_batch_gradients,
            generator.params, discriminator, lpips_params, adversarial,
            jnp.asarray(discriminator_steps, jnp.int32), step_key,
            jnp.asarray(progress, jnp.float32),
        )  # fmt: skip
        parts = settings.micro_batches
        gradients = average_micro_batches(step, (images, keys), parts)
        statistics = self.sum(jax.tree.map(lambda x: x * parts, gradients.statistics))
        generator_gradient, discriminator_gradient, metrics = self.mean(
            (gradients.generator, gradients.discriminator, gradients.metrics)
        )
        metrics["perplexity"] = losses.perplexity(statistics["counts"])
        metrics["generator_gradient"] = optax.tree.norm(generator_gradient)
        if adversarial:
            metrics["discriminator_gradient"] = optax.tree.norm(discriminator_gradient)
        return Gradients(
            generator_gradient, discriminator_gradient, gradients.extra, metrics, statistics
        )

    def compute_micro_batch_gradients(
        self,
        generator: Any,
        discriminator: Net,
        lpips_params: Any,
        adversarial: bool,
        discriminator_steps: jax.Array,
        step_key: jax.Array | None,
        progress: jax.Array,
        arrays: tuple[jax.Array, Keys],
    ) -> Gradients:
        """Returns the gradients and losses of one micro-batch on this device. `arrays` holds the
        images and the keys."""
        settings, (images, keys) = self.settings, arrays
        training = None
        if keys.codes is not None and keys.place is not None and step_key is not None:
            training = Training(keys.codes, keys.place, step_key, progress)
        forward = self.forward(generator, images, lpips_params, training)
        cotangent, metrics = forward.cotangent, forward.metrics
        metrics["loss"] = (
            metrics["reconstruction_loss"] + settings.codebook_weight * metrics["codebook"]
        )
        if not adversarial:
            return Gradients(forward.vjp(cotangent), None, None, metrics, forward.statistics)
        adversary = self.forward_discriminator(
            discriminator.params, discriminator.extra, images, forward.reconstruction,
            discriminator_steps, keys,
        )  # fmt: skip
        metrics |= adversary.metrics
        weight = jnp.asarray(settings.discriminator_weight, jnp.float32)
        if settings.adaptive_weight:
            at_last_kernel = functools.partial(
                self.compute_last_kernel_gradient, generator, forward.last
            )
            weight *= losses.adaptive_weight(
                at_last_kernel(cotangent), at_last_kernel(adversary.cotangent),
                settings.adaptive_weight_max,
            )  # fmt: skip
            metrics["adaptive_weight"] = weight
        metrics["loss"] += weight * metrics["adversarial"]
        gradient = forward.vjp(cotangent + weight * adversary.cotangent)
        return Gradients(gradient, adversary.gradient, adversary.extra, metrics, forward.statistics)

    def forward(
        self, params: Any, images: jax.Array, lpips_params: Any, training: Training | None = None
    ) -> GeneratorPass:
        """Runs the generator's forward pass on images, and computes the losses between them and
        their reconstruction."""

        def generate(params: Any) -> tuple[Any, Any]:
            output, variables = self.generator.apply(
                {"params": params}, images, training, mutable=["intermediates"]
            )
            last = variables["intermediates"]["decoder"]["last"][0]
            codebook = output.quantized.loss.mean()
            return (output.images, codebook), (output.quantized, last)

        def image_loss(reconstruction: jax.Array) -> tuple[jax.Array, Any]:
            terms = self.compute_image_losses(images, reconstruction, lpips_params)
            means = {key: values.mean() for key, values in terms.items()}
            return means["reconstruction_loss"], means

        (reconstruction, codebook), pullback, (quantized, last) = jax.vjp(
            generate, params, has_aux=True
        )

        def vjp(cotangent: jax.Array) -> Any:
            codebook_weight = jnp.asarray(self.settings.codebook_weight, codebook.dtype)
            return pullback((cotangent, codebook_weight))[0]

        cotangent, metrics = jax.grad(image_loss, has_aux=True)(reconstruction)
        metrics |= {"codebook": codebook}
        counts = self.count_codes(quantized.indices)
        statistics = (quantized.statistics or {}) | {"counts": counts}
        return GeneratorPass(reconstruction, last, cotangent, vjp, statistics, metrics)

    def update_quantizer(self, generator: Net, statistics: dict[str, jax.Array]) -> Net:
        """Returns the generator after its optimizer step, with the quantizer's own changes. They
        also apply to the EMA: an average of a restarted code and the one before would be neither.
        """
        if not generator.extra:
            return generator
        params = generator.params["quantizer"]
        new_params, extra = self.generator.quantizer.update(params, generator.extra, statistics)
        ema = generator.ema
        if ema is not None:
            averages = jax.tree.map(
                lambda average, old, new: average + (new - old),
                ema["quantizer"], params, new_params,
            )  # fmt: skip
            ema = ema | {"quantizer": averages}
        new_params = generator.params | {"quantizer": new_params}
        return generator.replace(params=new_params, extra=extra, ema=ema)

    def count_codes(self, indices: jax.Array, weight: jax.Array | float = 1.0) -> jax.Array:
        """Returns how often each code was used on this device, float32 [k], with each example
        weighted by `weight` [b,1,1]."""
        weights = jnp.broadcast_to(weight, indices.shape).astype(jnp.float32)
        return jnp.zeros(self.settings.codebook_size).at[indices].add(weights)

    def forward_discriminator(
        self,
        params: Any,
        extra: dict[str, Any],
        images: jax.Array,
        reconstruction: jax.Array,
        discriminator_steps: jax.Array,
        keys: Keys,
    ) -> DiscriminatorPass:
        """Runs the discriminator on the reconstruction and on the images, and computes its losses
        and gradients. `extra` is its extra state after `discriminator_steps` steps."""
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
            terms = {"discriminator": loss}
            if settings.lecam_weight:
                lecam = losses.lecam(real, fake, averages["real"], averages["fake"]).mean()
                loss += settings.lecam_weight * lecam
                terms["lecam"] = lecam
            return loss, terms

        means = self.mean({"real": real.mean(), "fake": fake.mean()})
        if settings.lecam_weight:
            averages = ema_update(extra["lecam"], means, settings.lecam_decay, discriminator_steps)
            extra["lecam"] = averages

        # The cotangents of the logits: one for the generator, two for the discriminator.
        adversarial, for_generator = jax.value_and_grad(generator_loss)(fake)
        (for_real, for_fake), terms = jax.grad(discriminator_loss, (0, 1), has_aux=True)(real, fake)
        gradient = jax.tree.map(jnp.add, pull_real(for_real)[0], pull_fake(for_fake)[0])
        metrics = terms | {
            "adversarial": adversarial, "logits_real": means["real"], "logits_fake": means["fake"]
        }  # fmt: skip
        return DiscriminatorPass(pull_fake(for_generator)[1], gradient, extra, metrics)

    def evaluate(
        self, state: TrainState, arrays: dict[str, jax.Array], lpips_params: Any, started: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns sums over a batch, from which `summarize` computes the metrics of a split.
        `started` is 1 if the discriminator has started, else 0."""
        generator, discriminator = state.nets["generator"], state.nets["discriminator"]
        pixels, weight = gather_batch(arrays)[0], arrays["weight"]
        images = to_float(pixels)
        output = reconstruct(self.generator, generator.eval_params, images)
        metrics = self.compute_image_losses(images, output.images, lpips_params)
        metrics["codebook"] = losses.per_example(output.quantized.loss)
        originals, outputs = pixels / 255, to_uint8(output.images) / 255
        metrics["psnr"] = psnr(originals, outputs)
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
        sums = {key: (values * weight).sum() for key, values in metrics.items()}
        sums |= {key: started * (values * weight).sum() for key, values in adversarial.items()}
        sums |= {"examples": weight.sum(), "started": started * weight.sum()}
        sums["counts"] = self.count_codes(output.quantized.indices, weight[:, None, None])
        return self.sum(sums)
