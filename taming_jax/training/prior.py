"""Stage 2: the prior over the codes of stage 1.

The generator whose codes the transformer speaks is part of its state, and so of its checkpoints:
training stage 1 on, or throwing its checkpoints away, changes nothing here.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taming_jax.config.load import differences
from taming_jax.config.schema import Config
from taming_jax.data import datasets
from taming_jax.data.augment import augments
from taming_jax.data.batches import gather_batch
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.models.vqgan import build_vqgan, decode_indices
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Compiled, Devices, map_batches, maybe_pmean, maybe_psum
from taming_jax.priors.decoding import micro_batch, sample_keys
from taming_jax.priors.registry import Prior, build_prior
from taming_jax.training.accumulate import mean_over_parts
from taming_jax.training.checkpoints import Store, keep_settings
from taming_jax.training.stage import Stage
from taming_jax.training.state import (
    CODES,
    DROPOUT,
    LABELS,
    Net,
    TrainState,
    apply_if_finite,
    copy_buffers,
    example_keys,
    schedule,
    with_clipping,
)
from taming_jax.training.tokens import TokenFeed, Tokenizer


def adamw(config: Config) -> Any:
    """AdamW with decay on matrices only (tables of embeddings among them, norms and biases not),
    behind the bound on gradients; without a rate."""
    prior = config.prior
    decay = optax.add_decayed_weights(
        prior.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    return with_clipping(
        optax.chain(optax.scale_by_adam(*prior.betas), decay), prior.grad_clip_norm
    )


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """Warm-up and cosine decay; or one cycle (arXiv 1708.07120) with the shares of PyTorch's
    OneCycleLR: up from a 25th over the first 0.3 of the run, then down to almost nothing. Adam's
    betas stay as they are."""
    prior = config.prior
    if prior.schedule == "one-cycle":
        return optax.cosine_onecycle_schedule(steps, prior.learning_rate)
    return schedule(prior, steps, prior.learning_rate)


def fresh_transformer(config: Config, model: Prior, key: jax.Array) -> TrainState:
    """A transformer that has learned nothing, on one device."""
    tokens = jnp.zeros((1, model.grid[0] * model.grid[1]), jnp.int32)
    params = jax.jit(model.init)(key, tokens)["params"]
    net = Net(params, jax.jit(adamw(config).init)(params))
    # In buffers of their own, since the state is donated.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, {"transformer": net}, skipped)


def training_step(
    config: Config,
    model: Prior,
    steps: int,
    axis_name: str | None,
    state: TrainState,
    arrays: dict[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """The pure step of a run of so many: one batch of codes, gathered where it lies."""
    prior, seed = config.prior, config.seed
    codes, labels = gather_batch(arrays)
    codes = codes.astype(jnp.int32)
    keys = {
        name: example_keys(seed, purpose, state.step, arrays["place"])
        for name, purpose in (("dropout", DROPOUT), ("labels", LABELS), ("codes", CODES))
    }
    drop = functools.partial(jax.random.bernoulli, p=prior.label_dropout)
    labels = jnp.where(jax.vmap(drop)(keys.pop("labels")), model.classes, labels)
    net = state.nets["transformer"]

    def part(arrays: Any) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(lambda params: model.loss(params, *arrays).mean())(net.params)

    means = mean_over_parts(part, (labels, codes, keys), prior.micro_batches)
    nll, gradient = maybe_pmean(means, axis_name)
    metrics = {"nll": nll, "transformer_gradient": optax.tree.norm(gradient)}
    rate = learning_rate(config, steps)(state.step)
    nets = state.nets | {"transformer": net.with_update(adamw(config), gradient, rate)}
    return apply_if_finite(state, nets, metrics, ("nll", "transformer_gradient"))


def chosen_generator(folder: Path, anew: bool) -> tuple[Any, Config, dict[str, Any] | None]:
    """The generator whose codes a run's prior predicts: the one in the newest checkpoint of the
    prior, or, before there is one (or where the prior begins `anew`), the best of stage 1, its
    moving average where it keeps one: its parameters, its config, and the fingerprint of the
    dataset it was trained on, where that is known.

    Raises UserError where the folder holds neither.
    """
    prior = Store(folder, "prior")
    checkpoint = None if anew else next(prior.readable(reversed(prior.steps())), None)
    if checkpoint is None:
        checkpoint = Store(folder, "vqgan").chosen()
    return checkpoint.generator, checkpoint.config, checkpoint.dataset


class PriorStage(Stage):
    """Stage 2. Raises UserError where the run's folder holds no stage 1, or one of other codes."""

    name = "prior"
    best_metric = "nll"
    learned = ("transformer",)

    def __init__(self, config: Config, devices: Devices, restart: bool = False):
        self.generator, trained, seen = distributed.run_on_primary(
            lambda: chosen_generator(config.folder, restart)
        )
        different = differences(config, trained, ("data", "vqgan"))
        if different:
            raise UserError(
                f"the generator of the prior in {config.folder} was trained otherwise: "
                f"{'; '.join(different)}. {keep_settings(config.folder)} If stage 1 was trained "
                "anew, begin a prior on it with --restart."
            )
        super().__init__(config, devices)
        others = datasets.fingerprint_diff(self.dataset, seen)
        if others:
            raise UserError(
                f"the generator in {config.folder} was trained on other data: {'; '.join(others)}. "
                "Name the same by --data.path, or train a stage 1 on this in another --workdir."
            )
        # In float32 whatever the transformer computes in: the codes are the data.
        self.vqgan = build_vqgan(dataclasses.replace(config, dtype="float32"))
        self.model = build_prior(config, len(self.splits.class_names))
        self.model.check_trainable()
        step = functools.partial(training_step, config, self.model, self.steps, devices.axis_name)
        self._step = devices.compile(step, donate=True)
        self.evaluation = devices.compile(self._evaluate)
        self._draw_images = jax.jit(self.make_images)  # of the first process alone

    def feeds(self) -> tuple[TokenFeed, TokenFeed]:
        folder, settings = self.config.folder / "tokens", self.config.prior
        tokenizer = Tokenizer(folder, self.vqgan, self.generator, self.config, self.devices)
        versions = settings.augmented_versions if augments(self.config.data) else 1
        train = TokenFeed(tokenizer, "train", self.splits.train, settings.batch_size, versions)
        validation = TokenFeed(tokenizer, "validation", self.splits.validation, settings.batch_size)
        return train, validation

    def init(self, key: jax.Array) -> TrainState:
        state = fresh_transformer(self.config, self.model, key)
        generator = Net(copy_buffers(self.generator), ())
        return state.replace(nets=state.nets | {"generator": generator})

    def compiled_step(self, step: int) -> Compiled:
        return self._step

    def _evaluate(self, state: TrainState, arrays: dict[str, Any]) -> dict[str, jax.Array]:
        """Sums over a batch of codes."""
        codes, labels = gather_batch(arrays)
        codes, weight = codes.astype(jnp.int32), arrays["weight"]
        params = state.nets["transformer"].params
        with jax.default_matmul_precision("highest"):
            metrics = self.model.evaluate(params, labels, codes)
        sums = {name: (values * weight).sum() for name, values in metrics.items()}
        return maybe_psum(sums | {"examples": weight.sum()}, self.devices.axis_name)

    def summarise(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """The means of the prior's metrics, of which `nll` is in nats per code, and the rate of
        the codes in bits per subpixel of the image."""
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
        """Images uint8 [b,h,w,c] of `labels` and `numbers` int32 [b], drawn as the config says, by
        the keys that `Run.sample` has for the same seed, classes and numbers."""
        settings, labels = self.config.prior, arrays["labels"]
        with jax.default_matmul_precision("highest"):
            codes = self.model.sample(
                params["transformer"], labels,
                sample_keys(np.uint32(self.config.seed), labels, arrays["numbers"]),
                temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                guidance_scale=settings.guidance_scale,
            )  # fmt: skip
            return to_uint8(decode_indices(self.vqgan, params["generator"], codes))

    def draw(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        from taming_jax import figures  # not before: matplotlib is a second to import

        names, columns = self.splits.class_names, 8
        classes = datasets.evenly_spaced(len(names), 10).astype(np.int32)
        params = self.devices.fetch({name: net.params for name, net in state.nets.items()})
        arrays = {
            "labels": np.repeat(classes, columns),
            "numbers": np.tile(np.arange(columns, dtype=np.int32), len(classes)),
        }
        images = map_batches(
            functools.partial(self._draw_images, params), arrays, micro_batch(self.devices.list[0])
        )
        step = int(self.devices.fetch(state.step))
        figures.loss_curves(rows, folder / "prior_loss.png", "Prior")
        drawn = [names[i] for i in classes]
        title = f"Samples of each class (step {step})"
        figure = figures.labelled_grid(images, drawn, columns, title)
        figures.save(figure, folder / "samples.png")
