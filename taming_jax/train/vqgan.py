"""Stage 1: generator and discriminator trained against each other, as the loop wants a stage.

The step runs the generator once forward and once back. What the image should become is collected
as cotangents of the reconstruction (perceptual and L1 in one, adversarial in the other); the
adaptive weight needs both only at the decoder's last kernel, one convolution away; then their
weighted sum is pulled back through the generator. The discriminator's forward pass on the
reconstruction serves both players, with a pullback for each.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from taming_jax import figures, losses
from taming_jax.config import Config, VQGANConfig
from taming_jax.data import sources
from taming_jax.data.feeds import Batch, ResidentFeed, take, to_float
from taming_jax.models.discriminator import Discriminator
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.models.vqgan import (
    VQGAN,
    build_vqgan,
    decode_indices,
    grid_size,
    reconstruct,
)
from taming_jax.train.devices import Compiled, Devices, averaged, summed
from taming_jax.train.state import Net, TrainState, clipped, copied, moved, schedule


class Gradients(NamedTuple):
    """What a step learns from a batch, averaged over the devices. `discriminator` and `extra` (its
    state afterwards) are None where the adversarial part is off."""

    generator: Any
    discriminator: Any
    extra: Any
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
        self, params: Any, stats: Any, images: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits in training mode, and the running statistics afterwards."""
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
    ) -> Gradients:
        """Every loss and gradient of one step on images float [b,h,w,c] in [-1, 1].

        `discriminator_steps` is how many steps the discriminator has taken (LeCAM's averages need
        it).
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
            adversary = self.adversary(discriminator, images, reconstruction, discriminator_steps)
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
        self, net: Net, images: jax.Array, reconstruction: jax.Array, steps: jax.Array | int
    ) -> "Adversary":
        """The adversarial part: one forward pass on the reconstruction, one on the images."""
        settings, stats = self.settings, net.extra["batch_stats"]

        fake, pull_fake, stats = jax.vjp(
            lambda params, x: self.discriminate(params, stats, x),
            net.params, reconstruction, has_aux=True,
        )  # fmt: skip
        real, pull_real, stats = jax.vjp(
            lambda params: self.discriminate(params, stats, images), net.params, has_aux=True
        )
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


class Adversary(NamedTuple):
    """What the discriminator says: the generator's adversarial cotangent of the reconstruction,
    the gradient of the discriminator's own loss on this device, and its state afterwards."""

    cotangent: jax.Array
    gradient: Any
    extra: dict[str, Any]
    metrics: dict[str, jax.Array]


class VQGANStage:
    """Stage 1, as train/loop.py wants a stage."""

    name = "vqgan"
    monitor = "nll"

    def __init__(self, config: Config, devices: Devices):
        settings = config.vqgan
        devices.check_batch(self.name, settings.batch_size)
        frozen = devices.replicate(load_lpips() if settings.perceptual_weight else {})
        self.config, self.devices = config, devices
        self.splits = sources.load(config.data)
        self.steps = settings.total_steps(len(self.splits.train.images))
        self.start = round(settings.discriminator_start * self.steps)
        self.networks = Networks.build(config, devices.axis_name)
        self._optimiser = clipped(optax.scale_by_adam(*settings.betas), settings.clip)
        self._rates = {
            "generator": schedule(settings, self.steps, settings.learning_rate),
            "discriminator": schedule(settings, self.steps, settings.discriminator_learning_rate),
        }
        self._steps = {
            adversarial: devices.compile(self.step_function(adversarial), frozen, donate=True)
            for adversarial in (False, True)
        }
        self._evaluate = devices.compile(self._evaluation, frozen)
        self._reconstruct, self._decode = _drawing(self.networks.generator)

    def feeds(self) -> tuple[ResidentFeed, ResidentFeed]:
        size = self.config.vqgan.batch_size
        train, validation = (
            ResidentFeed(split, size, self.config.seed, self.devices)
            for split in (self.splits.train, self.splits.validation)
        )
        return train, validation

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state, on one device."""
        settings, data = self.config.vqgan, self.config.data
        images = jnp.zeros((1, data.image_size, data.image_size, data.channels))
        for_generator, for_discriminator = jax.random.split(key)

        # Run once: three seconds less to compile when it is not optimised, to the same values.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def create() -> TrainState:
            generator = self.networks.generator.init(for_generator, images)["params"]
            # A stem of one image would make BatchNorm divide by zero: initialised in evaluation.
            variables = self.networks.discriminator.init(for_discriminator, images, train=False)
            extra = {"batch_stats": variables["batch_stats"]}
            if settings.lecam_weight:
                extra["lecam"] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
            discriminator = variables["params"]
            return TrainState(
                step=jnp.zeros((), jnp.int32),
                nets={
                    "generator": Net(
                        generator, self._optimiser.init(generator),
                        ema=None if settings.ema_decay is None else copied(generator),
                    ),
                    "discriminator": Net(
                        discriminator, self._optimiser.init(discriminator), extra
                    ),
                },
            )  # fmt: skip

        return create()

    def step_function(self, adversarial: bool) -> Callable[..., tuple[TrainState, Any]]:
        """The pure step(state, arrays, lpips_params) -> (state, metrics), before (False) or after
        (True) the discriminator's start."""
        settings = self.config.vqgan

        def step(state: TrainState, arrays: Any, lpips_params: Any) -> tuple[TrainState, Any]:
            generator, discriminator = state.nets["generator"], state.nets["discriminator"]
            images = to_float(take(arrays)[0])
            found = self.networks.gradients(
                generator, discriminator, images, lpips_params, adversarial, state.step - self.start
            )
            rate = self._rates["generator"](state.step)
            generator = generator.updated(self._optimiser, found.generator, rate)
            if settings.ema_decay is not None:
                generator = generator.averaged(settings.ema_decay, state.step)
            if adversarial:
                rate = self._rates["discriminator"](state.step)
                discriminator = discriminator.updated(
                    self._optimiser, found.discriminator, rate
                ).replace(extra=found.extra)
            nets = {"generator": generator, "discriminator": discriminator}
            return TrainState(state.step + 1, nets), found.metrics

        return step

    def compiled(self, adversarial: bool) -> Compiled:
        """The step before (False) or after (True) the discriminator's start, on the devices."""
        return self._steps[adversarial]

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        return self.compiled(batch.step >= self.start)(state, batch.arrays)

    def _evaluation(self, state: TrainState, arrays: Any, lpips_params: Any) -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            started = (state.step > self.start).astype(jnp.float32)
            return self.networks.evaluate(state, arrays, lpips_params, started)

    def eval_step(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        return self._evaluate(state, batch.arrays)

    def summarise(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """The metrics of a split. `usage` is the share of codes used at all."""
        counts, examples, started = (sums[key] for key in ("counts", "examples", "started"))
        metrics = {}
        for key, value in sums.items():
            if key in ("adversarial", "discriminator"):
                if started:
                    metrics[key] = float(value / started)
            elif key not in ("counts", "examples", "started"):
                metrics[key] = float(value / examples)
        metrics["perplexity"] = float(losses.perplexity(jnp.asarray(counts)))
        metrics["usage"] = float((counts > 0).mean())
        return metrics

    def draw(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        """The figures of stage 1, from the state, a validation's sums, and the log's rows."""
        counts = sums["counts"]
        params = self.devices.fetch(state.nets["generator"].chosen)
        step = int(self.devices.fetch(state.step))
        images = self.splits.validation.images[:10]
        rng = np.random.default_rng(self.config.seed)
        grid = grid_size(self.config)
        random = rng.choice(len(counts), (32, grid, grid), p=counts / counts.sum())
        order = np.argsort(-counts, kind="stable")[:256]
        solid = np.broadcast_to(order[:, None, None], (len(order), *[min(grid, 8)] * 2))
        decoded = [self._decode(params, solid[i : i + 32]) for i in range(0, len(solid), 32)]

        figures.loss_curves(
            rows, folder / "loss_curves.png", "VQ-GAN", mark=self.start, mark_name="discriminator"
        )
        figures.reconstructions(
            images, self._reconstruct(params, images), folder / "reconstructions.png", step
        )
        figures.codebook_usage(counts, folder / "codebook_usage.png", step)
        figures.random_latents(self._decode(params, random), folder / "random_latents.png", step)
        figures.codebook(
            np.concatenate(decoded), counts[order], folder / "codebook.png", len(counts), step
        )


def _drawing(model: VQGAN) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """Compiled reconstruction of uint8 images and decoding of indices, both to float in [-1, 1]."""
    through = jax.jit(lambda params, images: reconstruct(model, params, to_float(images)).images)
    decode = jax.jit(functools.partial(decode_indices, model))
    return (
        lambda params, images: np.asarray(through(params, images)),
        lambda params, indices: np.asarray(decode(params, np.asarray(indices, np.int32))),
    )
