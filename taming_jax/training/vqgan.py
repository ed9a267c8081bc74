"""Stage 1: generator and discriminator trained against each other."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taming_jax import losses
from taming_jax.config.load import replaced
from taming_jax.config.schema import Config
from taming_jax.config.validation import warn_about_attention
from taming_jax.data.augment import augmented
from taming_jax.data.batches import Feed, feed, take
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError, say
from taming_jax.models.lpips import load_lpips
from taming_jax.models.vqgan import decode_indices, reconstruct
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Compiled, Devices
from taming_jax.training.checkpoints import Store
from taming_jax.training.stage import Stage
from taming_jax.training.state import (
    AUGMENTATION,
    CODES,
    FAKE,
    REAL,
    Net,
    TrainState,
    clipped,
    copied,
    example_keys,
    schedule,
    stepped,
)
from taming_jax.training.vqgan_step import Keys, Networks


def with_fixed_start(config: Config, examples: int, created: Config | None) -> Config:
    """The config with the step at which the discriminator starts. It is computed when a run is
    created, and kept when the run is resumed, `created` being the config it has so far: were it
    computed again for a longer run, a discriminator that has started could be switched off.

    Raises UserError where the config names another step than the run's.
    """
    given, own = config.vqgan.discriminator_start_step, config.vqgan.start_step(examples)
    start = own if created is None else created.vqgan.start_step(examples)
    if given not in (None, start):
        fixed = "no start of the discriminator" if start is None else str(start)
        raise UserError(
            f"--vqgan.discriminator-start-step is {given}, but the run in {config.folder} was "
            f"created with {fixed}; leave the setting out, or begin anew with --restart."
        )
    if start != own:
        say(f"The discriminator starts after step {start}, which was fixed when this run began.")
    return replaced(config, "vqgan", discriminator_start_step=start)


class VQGANStage(Stage):
    """Stage 1 of a new run, or of the one that its folder holds, unless that begins anew."""

    name = "vqgan"
    best_metric = "nll"
    learned = ("generator", "discriminator")

    def __init__(self, config: Config, devices: Devices, restart: bool = False):
        settings = config.vqgan
        frozen = devices.replicate(load_lpips() if settings.perceptual_weight else {})
        super().__init__(config, devices)
        store = Store(config.folder, self.name, self.best_metric)
        created = None if restart else distributed.from_first(store.last_config)
        config = with_fixed_start(config, len(self.splits.train.images), created)
        self.config = config
        start = config.vqgan.discriminator_start_step
        self.start = self.steps if start is None else start
        warn_about_attention(config)
        self.networks = Networks.build(config, devices.axis_name)
        adam = optax.scale_by_adam(*settings.betas, settings.epsilon)
        self._optimiser = clipped(adam, settings.clip)
        self._rates = {
            "generator": schedule(settings, self.steps, settings.learning_rate),
            "discriminator": schedule(settings, self.steps, settings.discriminator_learning_rate),
        }
        self._steps = {
            adversarial: devices.compile(self.step_function(adversarial), frozen, donate=True)
            for adversarial in (False, True)
        }
        self.evaluation = devices.compile(self._evaluate, frozen)
        model = self.networks.generator
        self._reconstruct = jax.jit(
            lambda params, images: reconstruct(model, params, to_float(images)).images
        )
        self._decode = jax.jit(functools.partial(decode_indices, model))

    def feeds(self) -> tuple[Feed, Feed]:
        size, share = self.config.vqgan.batch_size, self.config.data.resident_share
        train, validation = (
            feed(split, size, self.config.seed, self.devices, share)
            for split in (self.splits.train, self.splits.validation)
        )
        return train, validation

    def init(self, key: jax.Array) -> TrainState:
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
                skipped=jnp.zeros((), jnp.int32),
            )  # fmt: skip

        return create()

    def step_function(self, adversarial: bool) -> Callable[..., tuple[TrainState, Any]]:
        """The pure step(state, arrays, lpips_params) -> (state, metrics), before (False) or after
        (True) the discriminator's start."""
        settings = self.config.vqgan

        def step(state: TrainState, arrays: Any, lpips_params: Any) -> tuple[TrainState, Any]:
            generator, discriminator = state.nets["generator"], state.nets["discriminator"]

            def keys(purpose: int) -> jax.Array:
                return example_keys(self.config.seed, purpose, state.step, arrays["place"])

            images = to_float(augmented(take(arrays)[0], keys(AUGMENTATION), self.config.data))
            draws = Keys()
            if settings.diff_augment:
                draws = draws._replace(real=keys(REAL), fake=keys(FAKE))
            if self.networks.generator.quantizer.draws:
                draws = draws._replace(codes=keys(CODES))
            found = self.networks.gradients(
                generator, discriminator, images, lpips_params, adversarial,
                state.step - self.start, draws, self.temperature(state.step),
            )  # fmt: skip
            rate = self._rates["generator"](state.step)
            generator = generator.updated(self._optimiser, found.generator, rate)
            if settings.ema_decay is not None:
                generator = generator.averaged(settings.ema_decay, state.step)
            if adversarial:
                rate = self._rates["discriminator"](state.step)
                learned = discriminator.updated(self._optimiser, found.discriminator, rate)
                if settings.discriminator_every > 1:
                    learns = (state.step - self.start) % settings.discriminator_every == 0
                    learned = jax.tree.map(
                        lambda new, old: jnp.where(learns, new, old), learned, discriminator
                    )
                discriminator = learned.replace(extra=found.extra)
            nets = {"generator": generator, "discriminator": discriminator}
            deciding = ["loss", "generator_gradient"]
            if adversarial:
                deciding += ["discriminator", "discriminator_gradient"]
                deciding += ["lecam"] if settings.lecam_weight else []
            return stepped(state, nets, found.metrics, deciding)

        return step

    def temperature(self, step: jax.Array) -> jax.Array:
        """That of the Gumbel-softmax trick at a step."""
        first, last = self.config.vqgan.gumbel_temperature
        share = (1 + jnp.cos(jnp.pi * step / self.steps)) / 2
        return last + (first - last) * share

    def compiled_step(self, step: int) -> Compiled:
        return self._steps[step >= self.start]

    def _evaluate(self, state: TrainState, arrays: Any, lpips_params: Any) -> dict[str, Any]:
        """Sums over a batch, with the discriminator's losses once it has started."""
        with jax.default_matmul_precision("highest"):
            started = (state.step > self.start).astype(jnp.float32)
            return self.networks.evaluate(state, arrays, lpips_params, started)

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

    def make_images(self, params: dict[str, Any], arrays: dict[str, jax.Array]) -> jax.Array:
        """The reconstructions of images."""
        with jax.default_matmul_precision("highest"):
            images = to_float(arrays["images"])
            return to_uint8(
                reconstruct(self.networks.generator, params["generator"], images).images
            )

    def draw(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        from taming_jax import figures  # not before: matplotlib is a second to import

        counts = sums["counts"]
        params = self.devices.fetch(state.nets["generator"].chosen)
        step = int(self.devices.fetch(state.step))
        images = self.splits.validation.images[:10]
        rng = np.random.default_rng(self.config.seed)
        grid = self.config.grid_size
        random = rng.choice(len(counts), (32, grid, grid), p=counts / counts.sum())
        random = random.astype(np.int32)
        order = np.argsort(-counts, kind="stable")[:256].astype(np.int32)
        solid = np.broadcast_to(order[:, None, None], (len(order), *[min(grid, 8)] * 2))
        decoded = [self._decode(params, solid[i : i + 32]) for i in range(0, len(solid), 32)]

        figures.loss_curves(
            rows, folder / "loss_curves.png", "VQ-GAN (dotted: discriminator starts)", self.start
        )
        figures.reconstructions(
            images, self._reconstruct(params, images), folder / "reconstructions.png", step
        )
        figures.codebook_usage(
            counts, folder / "codebook_usage.png", f"the validation split after step {step}"
        )
        title = f"Codes drawn independently, as often as images use them (step {step}, no prior)"
        figure = figures.labelled_grid(self._decode(params, random), (), 8, title)
        figures.save(figure, folder / "random_latents.png")
        title = (
            f"The {len(order)} most used of {len(counts)} codes ({(counts > 0).sum()} are in use), "
            f"each decoded from a grid of itself (step {step})"
        )
        figure = figures.labelled_grid(np.concatenate(decoded), (), 16, title)
        figures.save(figure, folder / "codebook.png")
