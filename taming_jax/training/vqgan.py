"""Stage 1: adversarial training of the generator and the discriminator."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taming_jax import losses
from taming_jax.config.load import replace_section
from taming_jax.config.schema import Config
from taming_jax.config.validation import warn_about_attention
from taming_jax.data.augment import augment
from taming_jax.data.batches import Feed, build_feed, gather_batch
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError, say
from taming_jax.models.lpips import load_lpips
from taming_jax.models.vqgan import decode_indices, reconstruct
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Compiled, Devices, copy_buffers
from taming_jax.training.checkpoints import Store
from taming_jax.training.stage import Stage, select_dtype
from taming_jax.training.state import (
    AUGMENTATION,
    CODES,
    FAKE,
    REAL,
    RESTARTS,
    Metrics,
    Net,
    TrainState,
    add_clipping,
    apply_if_finite,
    build_schedule,
    make_example_keys,
    make_step_key,
)
from taming_jax.training.vqgan_step import Keys, VQGANObjective


def resolve_discriminator_start(config: Config, examples: int, created: Config | None) -> Config:
    """Returns the config with the step at which the discriminator starts.

    The step is computed when a run is created and stays the same when the run is resumed: computing
    it again for an extended run could switch off a discriminator that has already started.
    `created` is the config of the existing run, or None for a new run.

    Raises UserError if the config sets a step other than that of the existing run.
    """
    setting, default = config.vqgan.discriminator_start_step, config.vqgan.start_step(examples)
    start = default if created is None else created.vqgan.start_step(examples)
    if setting not in (None, start):
        fixed = "no discriminator" if start is None else str(start)
        raise UserError(
            f"--vqgan.discriminator-start-step is {setting}, but the run in {config.folder} was "
            f"created with {fixed}; leave the setting out, or start over with --restart."
        )
    if start not in (None, default):
        say(f"The discriminator starts after step {start}, as computed when the run was created.")
    return replace_section(config, "vqgan", discriminator_start_step=start)


class VQGANStage(Stage):
    """Stage 1 of a new run, or of the existing run in the folder unless `restart` is set."""

    name = "vqgan"
    best_metric = "reconstruction_loss"
    figures = (
        "loss_curves.png", "reconstructions.png", "codebook_usage.png", "random_latents.png",
        "codebook.png",
    )  # fmt: skip
    learned = ("generator", "discriminator")

    def __init__(self, config: Config, devices: Devices, restart: bool = False):
        settings = config.vqgan
        frozen = devices.replicate(load_lpips() if settings.perceptual_weight else {})
        store = Store(config.folder, self.name, self.best_metric)
        created = None if restart else distributed.run_on_primary(store.read_last_config)
        config = select_dtype(config, created)
        super().__init__(config, devices)
        config = resolve_discriminator_start(config, len(self.splits.train.images), created)
        self.config = config
        start = config.vqgan.discriminator_start_step
        self.start = self.steps if start is None else start
        warn_about_attention(config)
        self.objective = VQGANObjective.build(config, devices.axis_name)
        adam = optax.scale_by_adam(*settings.betas, settings.epsilon)
        self._optimizer = add_clipping(adam, settings.grad_clip_norm)
        self._schedules = {
            "generator": build_schedule(settings, self.steps, settings.learning_rate),
            "discriminator": build_schedule(
                settings, self.steps, settings.discriminator_learning_rate
            ),
        }
        self._steps = {
            adversarial: devices.compile(self.build_step(adversarial), frozen, donate=True)
            for adversarial in (False, True)
        }
        self.evaluation = devices.compile(self._evaluate, frozen)
        model = self.objective.generator
        self._reconstruct = jax.jit(
            lambda params, images: reconstruct(model, params, to_float(images)).images
        )
        self._decode = jax.jit(functools.partial(decode_indices, model))

    def build_feeds(self) -> tuple[Feed, Feed]:
        size, share = self.config.vqgan.batch_size, self.config.data.resident_share
        train, validation = (
            build_feed(split, size, self.config.seed, self.devices, share)
            for split in (self.splits.train, self.splits.validation)
        )
        return train, validation

    def init(self, key: jax.Array) -> TrainState:
        settings, data = self.config.vqgan, self.config.data
        images = jnp.zeros((1, data.image_size, data.image_size, data.channels))
        generator_key, discriminator_key = jax.random.split(key)

        # This runs only once. Without optimizations it compiles three seconds faster, and returns
        # the same results.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def create() -> TrainState:
            generator = self.objective.generator.init(generator_key, images)["params"]
            # Evaluation mode creates the same variables without computing batch statistics.
            variables = self.objective.discriminator.init(discriminator_key, images, train=False)
            extra = {"batch_stats": variables["batch_stats"]}
            if settings.lecam_weight:
                extra["lecam"] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
            discriminator = variables["params"]
            return TrainState(
                step=jnp.zeros((), jnp.int32),
                nets={
                    "generator": Net(
                        generator, self._optimizer.init(generator),
                        self.objective.generator.quantizer.init_state(),
                        ema=None if settings.ema_decay is None else copy_buffers(generator),
                    ),
                    "discriminator": Net(
                        discriminator, self._optimizer.init(discriminator), extra
                    ),
                },
                skipped=jnp.zeros((), jnp.int32),
            )  # fmt: skip

        return create()

    def build_step(self, adversarial: bool) -> Callable[..., tuple[TrainState, Metrics]]:
        """Returns the pure function step(state, arrays, lpips_params) -> (state, metrics) for the
        time before (False) or after (True) the discriminator starts."""
        settings = self.config.vqgan

        def step(state: TrainState, arrays: Any, lpips_params: Any) -> tuple[TrainState, Metrics]:
            generator, discriminator = state.nets["generator"], state.nets["discriminator"]

            def make_keys(purpose: int) -> jax.Array:
                return make_example_keys(self.config.seed, purpose, state.step, arrays["place"])

            images = to_float(
                augment(gather_batch(arrays)[0], make_keys(AUGMENTATION), self.config.data)
            )
            step_key = make_step_key(self.config.seed, RESTARTS, state.step)
            keys = Keys(codes=make_keys(CODES), place=arrays["place"])
            if settings.diff_augment:
                keys = keys._replace(real=make_keys(REAL), fake=make_keys(FAKE))
            gradients = self.objective.compute_gradients(
                generator, discriminator, images, lpips_params, adversarial,
                state.step - self.start, keys, step_key, state.step / self.steps,
            )  # fmt: skip
            rate = self._schedules["generator"](state.step)
            generator = generator.apply_gradients(self._optimizer, gradients.generator, rate)
            generator = self.objective.update_quantizer(generator, gradients.statistics)
            if settings.ema_decay is not None:
                generator = generator.update_ema(settings.ema_decay, state.step)
            if adversarial:
                rate = self._schedules["discriminator"](state.step)
                updated = discriminator.apply_gradients(
                    self._optimizer, gradients.discriminator, rate
                )
                if settings.discriminator_every > 1:
                    is_update = (state.step - self.start) % settings.discriminator_every == 0
                    updated = jax.tree.map(
                        lambda new, old: jnp.where(is_update, new, old), updated, discriminator
                    )
                discriminator = updated.replace(extra=gradients.extra)
            nets = {"generator": generator, "discriminator": discriminator}
            must_be_finite = ["loss", "generator_gradient"]
            if adversarial:
                must_be_finite += ["discriminator", "discriminator_gradient"]
                must_be_finite += ["lecam"] if settings.lecam_weight else []
            return apply_if_finite(state, nets, gradients.metrics, must_be_finite)

        return step

    def select_step(self, step: int, steps: int = 1) -> Compiled:
        return self._steps[step >= self.start]

    def _evaluate(self, state: TrainState, arrays: Any, lpips_params: Any) -> dict[str, Any]:
        """Returns sums over a batch. Adversarial losses are 0 before the discriminator starts."""
        started = (state.step > self.start).astype(jnp.float32)
        return self.objective.evaluate(state, arrays, lpips_params, started)

    def summarize(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns the metrics of a split. `usage` is the share of codes that are used at all."""
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
        """Returns the reconstructions uint8 [b,h,w,c] of `images`."""
        images = to_float(arrays["images"])
        return to_uint8(reconstruct(self.objective.generator, params["generator"], images).images)

    def draw_figures(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        from taming_jax import figures  # slow to import

        counts = sums["counts"]
        params = self.devices.fetch(state.nets["generator"].eval_params)
        step = int(self.devices.fetch(state.step))
        images = self.splits.validation.images[:10]
        rng = np.random.default_rng(self.config.seed)
        grid = self.config.grid_size
        random_codes = rng.choice(len(counts), (32, grid, grid), p=counts / counts.sum())
        random_codes = random_codes.astype(np.int32)
        most_used = np.argsort(-counts, kind="stable")[:256].astype(np.int32)
        uniform_grids = np.broadcast_to(
            most_used[:, None, None], (len(most_used), *[min(grid, 8)] * 2)
        )
        decoded = [
            self._decode(params, uniform_grids[i : i + 32])
            for i in range(0, len(uniform_grids), 32)
        ]

        start = self.config.vqgan.discriminator_start_step
        title = "VQ-GAN" + ("" if start is None else " (dotted: discriminator starts)")
        figures.plot_loss_curves(rows, folder / "loss_curves.png", title, start)
        figures.plot_reconstructions(
            images, self._reconstruct(params, images), folder / "reconstructions.png", step
        )
        figures.plot_codebook_usage(
            counts, folder / "codebook_usage.png", f"the validation split after step {step}"
        )
        title = (
            f"Codes drawn independently by their frequency in the images (step {step}, no prior)"
        )
        figure = figures.draw_grid(self._decode(params, random_codes), (), 8, title)
        figures.save(figure, folder / "random_latents.png")
        title = (
            f"The {len(most_used)} most used of {len(counts)} codes ({(counts > 0).sum()} in use), "
            f"each decoded from a grid of that code (step {step})"
        )
        figure = figures.draw_grid(np.concatenate(decoded), (), 16, title)
        figures.save(figure, folder / "codebook.png")
