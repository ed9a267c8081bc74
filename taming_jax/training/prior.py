"""Stage 2: training of the prior over the codes of stage 1.

The generator whose codes the prior predicts is stored next to the prior's checkpoints. The prior is
therefore unaffected if you continue to train stage 1 or delete its checkpoints.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taming_jax.config.load import advise_on_settings, diff_configs
from taming_jax.config.schema import Config
from taming_jax.data import datasets
from taming_jax.data.augment import uses_augmentation
from taming_jax.data.batches import gather_batch
from taming_jax.data.fingerprints import diff_fingerprints
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.models.vqgan import build_vqgan, decode_indices
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Compiled, Devices, map_batches, maybe_pmean, maybe_psum
from taming_jax.priors.decoding import sample_keys, sampling_batch_size
from taming_jax.priors.registry import Prior, build_prior
from taming_jax.training.accumulate import average_micro_batches
from taming_jax.training.checkpoints import Store
from taming_jax.training.dispatch import check_dispatch, scan_steps
from taming_jax.training.stage import Stage, select_dtype
from taming_jax.training.state import (
    CODES,
    DROPOUT,
    LABELS,
    Metrics,
    Net,
    TrainState,
    add_clipping,
    apply_if_finite,
    build_schedule,
    make_example_keys,
)
from taming_jax.training.tokens import TokenFeed, Tokenizer


def build_optimizer(config: Config) -> Any:
    """Returns AdamW with gradient clipping, but without a learning rate. Weight decay applies to
    matrices, including embedding tables, but not to norms and biases."""
    prior = config.prior
    decay = optax.add_decayed_weights(
        prior.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    return add_clipping(optax.chain(optax.scale_by_adam(*prior.betas), decay), prior.grad_clip_norm)


def build_prior_schedule(config: Config, steps: int) -> optax.Schedule:
    """Returns the learning rate schedule of a run of `steps` steps: warm-up and cosine decay, or
    the one-cycle schedule (arXiv 1708.07120). The latter has the defaults of PyTorch's OneCycleLR:
    it rises from 1/25 of the peak over the first 30% of the run, then decays to nearly zero.
    Unlike PyTorch's, it keeps Adam's betas constant."""
    prior = config.prior
    if prior.schedule == "one-cycle":
        return optax.cosine_onecycle_schedule(steps, prior.learning_rate)
    return build_schedule(prior, steps, prior.learning_rate)


def init_transformer(config: Config, model: Prior, key: jax.Array) -> TrainState:
    """Returns a randomly initialized training state of the prior on one device."""
    tokens = jnp.zeros((1, model.grid[0] * model.grid[1]), jnp.int32)
    params = jax.jit(model.init)(key, tokens)["params"]
    net = Net(params, jax.jit(build_optimizer(config).init)(params))
    # Separate buffers, since the state is donated.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, {"transformer": net}, skipped)


def train_step(
    config: Config,
    model: Prior,
    steps: int,
    axis_name: str | None,
    state: TrainState,
    arrays: dict[str, Any],
) -> tuple[TrainState, Metrics]:
    """Takes one step of a run of `steps` steps on a batch of codes, and returns the new state and
    the metrics. This is a pure function."""
    prior, seed = config.prior, config.seed
    codes, labels = gather_batch(arrays)
    codes = codes.astype(jnp.int32)
    keys = {
        name: make_example_keys(seed, purpose, state.step, arrays["place"])
        for name, purpose in (("dropout", DROPOUT), ("labels", LABELS), ("codes", CODES))
    }
    draw_is_dropped = functools.partial(jax.random.bernoulli, p=prior.label_dropout)
    labels = jnp.where(jax.vmap(draw_is_dropped)(keys.pop("labels")), model.classes, labels)
    net, progress = state.nets["transformer"], state.step / steps

    def loss_and_gradient(arrays: Any) -> tuple[jax.Array, Any]:
        labels, codes, keys = arrays

        def loss(params: Any) -> jax.Array:
            return model.loss(params, labels, codes, keys, progress).mean()

        return jax.value_and_grad(loss)(net.params)

    means = average_micro_batches(loss_and_gradient, (labels, codes, keys), prior.micro_batches)
    nll, gradient = maybe_pmean(means, axis_name)
    metrics = {"nll": nll, "transformer_gradient": optax.tree.norm(gradient)}
    rate = build_prior_schedule(config, steps)(state.step)
    nets = {"transformer": net.apply_gradients(build_optimizer(config), gradient, rate)}
    return apply_if_finite(state, nets, metrics, ("nll", "transformer_gradient"))


def load_generator(folder: Path, restart: bool) -> tuple[Any, Config, dict[str, Any] | None]:
    """Returns the parameters of the generator whose codes a run's prior predicts, its config, and
    the fingerprint of its training data, or None if that is not known.

    The generator comes from the newest checkpoint of the prior. If there is none, or with
    `restart`, it is the best one of stage 1 (its EMA, if there is one).

    Raises UserError if the folder holds neither.
    """
    store = Store(folder, "prior")
    checkpoint = None if restart else next(store.read_undamaged(reversed(store.steps())), None)
    if checkpoint is None:
        checkpoint = Store(folder, "vqgan").load_best()
    return checkpoint.generator, checkpoint.config, checkpoint.dataset


class PriorStage(Stage):
    """Stage 2. Raises UserError if the run's folder holds no stage 1, or one that was trained with
    other settings or on other data."""

    name = "prior"
    best_metric = "nll"
    figures = ("prior_loss.png", "samples.png")
    learned = ("transformer",)

    def __init__(self, config: Config, devices: Devices, restart: bool = False):
        generator, generator_config, generator_dataset = distributed.run_on_primary(
            lambda: load_generator(config.folder, restart)
        )
        differences = diff_configs(config, generator_config, ("data", "vqgan"))
        if differences:
            raise UserError(
                f"your settings differ from those of the generator in {config.folder}: "
                f"{'; '.join(differences)}. {advise_on_settings(config.folder)} If you trained "
                "stage 1 again, train a new prior on it with --restart."
            )
        config = select_dtype(config, generator_config)
        super().__init__(config, devices, {"generator": generator})
        check_dispatch(config.prior, len(self.splits.train.images))
        data_changes = diff_fingerprints(self.dataset, generator_dataset)
        if data_changes:
            raise UserError(
                f"the generator in {config.folder} was trained on other data: "
                f"{'; '.join(data_changes)}. Set --data.path to the same data, or train "
                "stage 1 on this data in another --workdir."
            )
        # Always encode in float32, even if the transformer uses bfloat16: the codes are its data.
        self.float32_vqgan = build_vqgan(dataclasses.replace(config, dtype="float32"))
        self.vqgan = build_vqgan(config)
        self.model = build_prior(config, len(self.splits.class_names))
        self.model.check_trainable()
        step = functools.partial(train_step, config, self.model, self.steps, devices.axis_name)
        self._step = devices.compile(step, donate=True)
        self._steps = devices.compile(scan_steps(step), donate=True)
        self.evaluation = devices.compile(self._evaluate)
        self._draw_images = jax.jit(self.make_images)  # runs in the primary process only

    def build_feeds(self) -> tuple[TokenFeed, TokenFeed]:
        folder, settings = self.config.folder / "tokens", self.config.prior
        tokenizer = Tokenizer(
            folder, self.float32_vqgan, self.frozen["generator"], self.config, self.devices
        )
        versions = settings.augmented_versions if uses_augmentation(self.config.data) else 1
        train = TokenFeed(tokenizer, "train", self.splits.train, settings.batch_size, versions)
        validation = TokenFeed(tokenizer, "validation", self.splits.validation, settings.batch_size)
        return train, validation

    def init(self, key: jax.Array) -> TrainState:
        return init_transformer(self.config, self.model, key)

    @property
    def steps_per_dispatch(self) -> int:
        return self.config.prior.steps_per_dispatch

    def select_step(self, step: int, steps: int = 1) -> Compiled:
        return self._step if steps == 1 else self._steps

    def _evaluate(self, state: TrainState, arrays: dict[str, Any]) -> dict[str, jax.Array]:
        """Returns sums over a batch of codes."""
        codes, labels = gather_batch(arrays)
        codes, weight = codes.astype(jnp.int32), arrays["weight"]
        params = state.nets["transformer"].params
        metrics = self.model.evaluate(params, labels, codes)
        sums = {name: (values * weight).sum() for name, values in metrics.items()}
        return maybe_psum(sums | {"examples": weight.sum()}, self.devices.axis_name)

    def summarize(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns the means of the prior's metrics. `nll` is in nats per code, and
        `code_bits_per_subpixel` is the same rate in bits per subpixel of the image."""
        data, examples = self.config.data, sums["examples"]
        means = {name: float(x / examples) for name, x in sums.items() if name != "examples"}
        codes, subpixels = self.config.grid_size**2, data.image_size**2 * data.channels
        nll = means.pop("nll")
        return {
            "nll": nll,
            "code_bits_per_subpixel": nll * codes / subpixels / float(np.log(2)),
            **means,
        }

    def make_images(self, params: dict[str, Any], arrays: dict[str, jax.Array]) -> jax.Array:
        """Returns sampled images uint8 [b,h,w,c] for `labels` and `numbers` int32 [b]. The sampling
        settings come from the config, and the random keys are those of `Run.sample` for the same
        seed, classes, and numbers."""
        settings, labels = self.config.prior, arrays["labels"]
        codes = self.model.sample(
            params["transformer"], labels,
            sample_keys(np.uint32(self.config.seed), labels, arrays["numbers"]),
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
            guidance_scale=settings.guidance_scale,
        ).codes  # fmt: skip
        return to_uint8(decode_indices(self.vqgan, params["generator"], codes))

    def draw_figures(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        from taming_jax import figures  # slow to import

        names, columns = self.splits.class_names, 8
        trained = np.unique(self.splits.train.labels)
        classes = trained[datasets.evenly_spaced(len(trained), 10)].astype(np.int32)
        params = {
            "transformer": self.devices.fetch(state.nets["transformer"].params), **self.frozen
        }  # fmt: skip
        arrays = {
            "labels": np.repeat(classes, columns),
            "numbers": np.tile(np.arange(columns, dtype=np.int32), len(classes)),
        }
        images = map_batches(
            functools.partial(self._draw_images, params),
            arrays,
            sampling_batch_size(self.devices.list[0], self.model.logits_per_image),
        )
        step = int(self.devices.fetch(state.step))
        figures.plot_loss_curves(rows, folder / "prior_loss.png", "Prior")
        row_names = [names[i] for i in classes]
        title = f"Samples of each class (step {step})"
        figure = figures.draw_grid(images, row_names, columns, title)
        figures.save(figure, folder / "samples.png")
