"""Stage 2: the transformer over the codes of stage 1, as the loop wants a stage.

The generator whose codes the transformer speaks is part of its state, and so of its checkpoints:
training stage 1 on, or throwing its checkpoints away, changes nothing here.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taming_jax import losses
from taming_jax.config.load import differences
from taming_jax.config.schema import Config, PriorConfig
from taming_jax.data import datasets
from taming_jax.data.augment import augments
from taming_jax.data.batches import Batch, rounded, take
from taming_jax.errors import UserError
from taming_jax.metrics.monitor import ValidationFD
from taming_jax.models.vqgan import build_vqgan, decode_indices
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices, averaged, in_batches, summed
from taming_jax.priors.autoregressive import GPT, apply_train, build_gpt, teacher_forced
from taming_jax.priors.decoding import micro_batch, sample, sample_keys
from taming_jax.training.accumulate import mean_over_parts, repeated
from taming_jax.training.checkpoints import Store, keep_settings
from taming_jax.training.state import (
    CODES,
    DROPOUT,
    LABELS,
    Net,
    TrainState,
    clipped,
    copied,
    example_keys,
    schedule,
    stepped,
)
from taming_jax.training.tokens import TokenFeed, Tokenizer


def adamw(config: Config) -> Any:
    """AdamW with decay on matrices only (tables of embeddings among them, norms and biases not),
    behind the bound on gradients; without a rate."""
    prior = config.prior
    decay = optax.add_decayed_weights(
        prior.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    return clipped(optax.chain(optax.scale_by_adam(*prior.betas), decay), prior.clip)


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """Warm-up and cosine decay; or one cycle (arXiv 1708.07120) with the shares of PyTorch's
    OneCycleLR: up from a 25th over the first 0.3 of the run, then down to almost nothing. Adam's
    betas stay as they are."""
    prior = config.prior
    if prior.schedule == "one-cycle":
        return optax.cosine_onecycle_schedule(steps, prior.learning_rate)
    return schedule(prior, steps, prior.learning_rate)


def fresh_transformer(config: Config, model: GPT, key: jax.Array) -> TrainState:
    """A transformer that has learned nothing, on one device."""
    tokens = jnp.zeros((1, model.length), jnp.int32)
    params = jax.jit(model.init)(key, tokens)["params"]
    net = Net(params, jax.jit(adamw(config).init)(params))
    # In buffers of their own, since the state is donated.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, {"transformer": net}, skipped)


def training_step(
    config: Config,
    model: GPT,
    steps: int,
    axis_name: str | None,
    state: TrainState,
    arrays: dict[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """The pure step of a run of so many: one batch of codes, gathered where it lies."""
    prior, seed = config.prior, config.seed
    codes, labels = take(arrays)
    codes = codes.astype(jnp.int32)
    keys = [
        example_keys(seed, purpose, state.step, arrays["place"])
        for purpose in (DROPOUT, LABELS, CODES)
    ]
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, prior.label_dropout))(keys[LABELS])
    tokens = teacher_forced(model, jnp.where(dropped, model.classes, labels), codes)
    if prior.keep_codes < 1:
        corrupt = functools.partial(corrupted, prior.keep_codes, model.codebook_size)
        rest = jax.vmap(corrupt)(keys[CODES], tokens[:, 1:])
        tokens = jnp.concatenate([tokens[:, :1], rest], 1)
    net = state.nets["transformer"]

    def part(arrays: Any) -> tuple[jax.Array, Any]:
        tokens, codes, keys = arrays

        def loss(params: Any) -> jax.Array:
            return losses.next_token(apply_train(model, params, tokens, keys), codes).mean()

        return jax.value_and_grad(loss)(net.params)

    means = mean_over_parts(part, (tokens, codes, keys[DROPOUT]), prior.micro_batches)
    nll, gradient = averaged(means, axis_name)
    metrics = {"nll": nll, "transformer_gradient": optax.tree.norm(gradient)}
    rate = learning_rate(config, steps)(state.step)
    nets = state.nets | {"transformer": net.updated(adamw(config), gradient, rate)}
    return stepped(state, nets, metrics, ("nll", "transformer_gradient"))


class Generator(NamedTuple):
    """A trained generator: its parameters, its config, and the identity of the dataset it was
    trained on, where that is known."""

    params: Any
    config: Config
    dataset: dict[str, Any] | None


def chosen_generator(folder: Path, anew: bool = False) -> Generator:
    """The generator whose codes a run's prior speaks: the one in the newest checkpoint of the
    prior, or, before there is one (or where the prior begins `anew`), the best of stage 1, its
    moving average where it keeps one.

    Raises UserError where the folder holds neither.
    """
    prior = Store(folder, "prior")
    for step in [] if anew else reversed(prior.steps()):
        with contextlib.suppress(ValueError):
            checkpoint = prior.read(step)
            return Generator(checkpoint.generator, checkpoint.config, checkpoint.dataset)
    checkpoint = Store(folder, "vqgan").chosen()
    return Generator(checkpoint.generator, checkpoint.config, checkpoint.dataset)


class PriorStage:
    """Stage 2, as training/loop.py wants a stage.

    Raises UserError where the run's folder holds no stage 1, or one that speaks other codes.
    """

    name = "prior"
    best_metric = "nll"
    learned: tuple[str, ...] = ("transformer",)

    def __init__(self, config: Config, devices: Devices, restart: bool = False):
        devices.check_batch(self.name, config.prior.batch_size, config.prior.micro_batches)
        self.config, self.devices = config, devices
        self.generator, trained, seen = distributed.from_first(
            lambda: chosen_generator(config.folder, anew=restart)
        )
        different = differences(config, trained, ("data", "vqgan"))
        if different:
            raise UserError(
                f"the generator of the prior in {config.folder} was trained otherwise: "
                f"{'; '.join(different)}. {keep_settings(config.folder)} If stage 1 was trained "
                "anew, begin a prior on it with --restart."
            )
        self.splits, self.dataset = datasets.load_same(lambda: datasets.load(config.data))
        others = datasets.unlike(self.dataset, seen)
        if others:
            raise UserError(
                f"the generator in {config.folder} was trained on other data: {'; '.join(others)}. "
                "Name the same by --data.path, or train a stage 1 on this in another --workdir."
            )
        # In float32 whatever the transformer computes in: the codes are the data.
        self.vqgan = build_vqgan(dataclasses.replace(config, dtype="float32"))
        self.model = build_gpt(config, len(self.splits.class_names))
        tokens = self.model.vocabulary
        if tokens is not None and self.model.first + self.model.classes > tokens:
            raise UserError(
                f"--prior.vocabulary {tokens} has no room for {self.model.classes} classes from "
                f"token {self.model.first}; take a larger one, or another --prior.first-class."
            )
        if self.model.length > self.model.longest:
            raise UserError(
                f"--prior.block-size {self.model.longest} does not hold the "
                f"{self.model.length} codes of an image; such a prior draws in windows, and is not "
                "trained on whole images."
            )
        self.steps = config.prior.total_steps(len(self.splits.train.images))
        step = functools.partial(training_step, config, self.model, self.steps, devices.axis_name)
        self._step = devices.compile(step, donate=True)
        self._evaluate = devices.compile(self.evaluation)
        validation = self.splits.validation
        self._monitor = ValidationFD(validation, config, devices) if config.prior.fd_every else None
        self._made = devices.compile(self._making)
        self._sample = jax.jit(functools.partial(draw_codes, self.model, config.prior))
        self._decode = jax.jit(functools.partial(decode_indices, self.vqgan))

    def feeds(self) -> tuple[TokenFeed, TokenFeed]:
        folder, settings = self.config.folder / "tokens", self.config.prior
        tokenizer = Tokenizer(folder, self.vqgan, self.generator, self.config, self.devices)
        versions = settings.augmented_versions if augments(self.config.data) else 1
        train = TokenFeed(tokenizer, "train", self.splits.train, settings.batch_size, versions)
        validation = TokenFeed(tokenizer, "validation", self.splits.validation, settings.batch_size)
        return train, validation

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state, on one device."""
        state = fresh_transformer(self.config, self.model, key)
        generator = Net(copied(self.generator), ())
        return state.replace(nets=state.nets | {"generator": generator})

    def compile(self, state: TrainState, training: Batch, validation: Batch) -> None:
        self._step.prepare(state, training.arrays)
        self._evaluate.prepare(state, validation.arrays)

    def flops(self, step: int) -> float | None:
        flops = self._step.flops
        return flops and flops * repeated(self.config.prior.micro_batches)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        return self._step(state, batch.arrays)

    def evaluation(self, state: TrainState, arrays: dict[str, Any]) -> dict[str, jax.Array]:
        codes, labels = take(arrays)
        codes, weight = codes.astype(jnp.int32), arrays["weight"]
        params = state.nets["transformer"].params
        with jax.default_matmul_precision("highest"):
            tokens = teacher_forced(self.model, labels, codes)
            logits = cast(jax.Array, self.model.apply({"params": params}, tokens))
        nll = losses.next_token(logits, codes)
        right = losses.per_example((logits.argmax(-1) == codes).astype(jnp.float32))
        sums = {"nll": nll * weight, "accuracy": right * weight, "examples": weight}
        return summed(jax.tree.map(jnp.sum, sums), self.devices.axis_name)

    def eval_step(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        return self._evaluate(state, batch.arrays)

    def summarise(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """`nll` in nats a code; the same in bits a dimension of the image; and how often the most
        likely code is the right one."""
        data = self.config.data
        nll = float(sums["nll"] / sums["examples"])
        dimensions = data.image_size**2 * data.channels
        return {
            "nll": nll,
            "bits_per_dim": nll * self.model.length / dimensions / float(np.log(2)),
            "accuracy": float(sums["accuracy"] / sums["examples"]),
        }

    def _making(self, state: TrainState, arrays: dict[str, jax.Array]) -> jax.Array:
        transformer, generator = (state.nets[name].params for name in ("transformer", "generator"))
        codes = draw_codes(
            self.model, self.config.prior, transformer, arrays["labels"], arrays["numbers"],
            np.uint32(self.config.seed),
        )  # fmt: skip
        with jax.default_matmul_precision("highest"):
            return rounded(decode_indices(self.vqgan, generator, codes))

    def distance(self, state: TrainState) -> float:
        """The Fréchet distance of samples, of the validation split's classes, to that split."""
        assert self._monitor is not None
        return self._monitor.distance(functools.partial(self._made, state))

    def draw(
        self, state: TrainState, folder: Path, sums: dict[str, np.ndarray], rows: list[dict]
    ) -> None:
        """The figures of stage 2."""
        from taming_jax import figures  # not before: matplotlib is a second to import

        names, columns = self.splits.class_names, 8
        classes = datasets.spread(len(names), 10).astype(np.int32)
        transformer, generator = (
            self.devices.fetch(state.nets[name].params) for name in ("transformer", "generator")
        )
        labels = np.repeat(classes, columns)
        numbers = np.tile(np.arange(columns, dtype=np.int32), len(classes))
        seed = np.uint32(self.config.seed)
        codes = in_batches(
            lambda part: self._sample(transformer, *part, seed), (labels, numbers),
            micro_batch(self.devices.list[0]),
        )  # fmt: skip
        # A row at a time: all of them at 256 px are more than many a device's memory holds.
        images = in_batches(functools.partial(self._decode, generator), codes, columns)
        step = int(self.devices.fetch(state.step))
        figures.loss_curves(rows, folder / "prior_loss.png", "Prior")
        drawn = [names[i] for i in classes]
        title = f"Samples of each class (step {step})"
        figure = figures.labelled_grid(images, drawn, columns, title)
        figures.save(figure, folder / "samples.png")


def corrupted(keep: float, codebook_size: int, key: jax.Array, codes: jax.Array) -> jax.Array:
    """Codes [t] of which a share `keep` stays and the others are drawn anew, as the official code's
    `pkeep`."""
    which, what = jax.random.split(key)
    drawn = jax.random.randint(what, codes.shape, 0, codebook_size)
    return jnp.where(jax.random.bernoulli(which, keep, codes.shape), codes, drawn)


def draw_codes(
    model: GPT,
    prior: PriorConfig,
    transformer: Any,
    labels: jax.Array,
    numbers: jax.Array,
    seed: jax.Array | np.uint32,
) -> jax.Array:
    """Grids of codes int32 [b,h',w'] of classes int [b], drawn as the preset says, by the keys
    that `Run.sample` has for the same seed, classes and numbers."""
    with jax.default_matmul_precision("highest"):
        codes = sample(
            model, transformer, labels, sample_keys(seed, labels, numbers), prior.temperature,
            prior.top_k, prior.top_p, prior.guidance_scale,
        )  # fmt: skip
    return codes.reshape(len(labels), *model.grid)
