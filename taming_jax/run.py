"""A finished (or half-finished) run as an object, for notebooks."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from taming_jax.checks import check_sampling
from taming_jax.config import Config
from taming_jax.data import sources
from taming_jax.data.sources import Split
from taming_jax.errors import UserError
from taming_jax.losses import next_token
from taming_jax.models.gpt import build_gpt, teacher_forced
from taming_jax.models.vqgan import build_vqgan, decode_indices, encode, images_at_once
from taming_jax.sampling import sample
from taming_jax.train import hosts
from taming_jax.train.devices import Compiled, Devices
from taming_jax.train.runtime import keep_programs
from taming_jax.train.store import Store
from taming_jax.train.tokens import Tokenizer

MICRO = 32  # images a device draws at once: another size would round otherwise, and turn a code
# Images a call of the compiled functions, which are compiled for these two sizes; the last batch is
# filled up.
FEW, BATCH = 8, 64


def load_run(workdir: str | Path) -> "Run":
    """The best checkpoints of the run in a folder (the newest where none was validated): the prior,
    where there is one, with the generator whose codes it speaks, else stage 1's.

    Raises UserError where the folder holds no run, or none of its checkpoints can be read.
    """
    folder = Path(workdir)
    return Run(folder, *hosts.from_first(lambda: _read(folder)))


def _read(folder: Path) -> tuple[Config, int, dict[str, Any] | None, Any, Any]:
    """What a run is made of, from its folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a run's, such as runs/mnist_tiny.")
    prior = Store(folder, "prior", "nll", read_only=True)
    if prior.steps():
        found, step = prior.chosen()
        nets = traverse_util.unflatten_dict(found.arrays)["nets"]
        transformer = nets["transformer"]["params"]
        return found.config, step, found.dataset, nets["generator"]["params"], transformer
    found, step = Store(folder, "vqgan", "nll", read_only=True).chosen()
    net = traverse_util.unflatten_dict(found.arrays)["nets"]["generator"]
    return found.config, step, found.dataset, net.get("ema", net["params"]), None


class Run:
    """A run's config, generator (its moving average where it keeps one) and prior, if it has one.

    Images are uint8 [n,h,w,c], or float [n,h,w,c] in [-1, 1], and are answered in kind. Products
    are computed at the highest precision the device has.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        step: int,
        dataset: dict[str, Any] | None,
        generator: Any,
        transformer: Any = None,
    ):
        self.workdir, self.config, self.step, self.dataset = workdir, config, step, dataset
        if config.compile_cache:
            keep_programs()
        self.params = jax.device_put(generator)
        # Codes are always computed in float32, as those the prior learned from were.
        self.model = build_vqgan(dataclasses.replace(config, dtype="float32"))
        self._encode = jax.jit(lambda params, images: encode(self.model, params, images).indices)
        self._decode = jax.jit(functools.partial(decode_indices, self.model))
        self.transformer = None
        self._samplers: dict[tuple, tuple[Devices, Compiled, Any]] = {}
        if transformer is not None:
            self.transformer = jax.device_put(transformer)
            classes = len(transformer["embedding"]) - config.vqgan.codes - 1
            if config.prior.vocabulary is not None:  # classes are among the codes
                classes = len(self.class_names)
            self.prior = build_gpt(config, classes)
            self._likelihood = jax.jit(self._of_codes)

    def __repr__(self) -> str:
        stage = "stage 1" if self.transformer is None else "both stages"
        return f"Run({str(self.workdir)!r}, {self.config.config}, {stage}, step {self.step})"

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        if self.dataset is None:
            return sources.load(self.config.data).class_names
        return tuple(self.dataset["class_names"])

    def labels(self, classes: int | str | Iterable[int | str]) -> np.ndarray:
        """Classes by number or by name as numbers, int32 [n]; a string is a name before it is a
        number. UserError for others."""
        if isinstance(classes, int | str | np.integer):
            classes = [classes]
        names = self.class_names
        numbers = {name: i for i, name in enumerate(names)}

        def number(given: int | str) -> int:
            if isinstance(given, str):
                found = numbers.get(given, int(given) if given.isdecimal() else -1)
            else:
                found = operator.index(given)
            if 0 <= found < len(names):
                return found
            shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise UserError(
                f"there is no class '{given}'; the classes are 0 to {len(names) - 1}: {shown}."
            )

        return np.array([number(given) for given in classes], np.int32)

    def _need_prior(self) -> None:
        if self.transformer is None:
            raise UserError(f"{self.workdir} has no prior yet; train one with train_prior.py.")

    def sample(
        self,
        classes: int | str | Iterable[int | str],
        per_class: int = 1,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        prefix: Any = None,
        seed: int = 0,
        devices: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """New images of classes (numbers or names), float32 [n,h,w,c] in [-1, 1]: `per_class` of
        the first, then of the second, and so on.

        Image i of a class depends on the seed, the class and i alone: images are drawn in
        micro-batches of one size on every device. A temperature of 0 takes the most likely codes;
        `top_k` and `top_p` leave unlikely ones out; a `guidance_scale` above 1 exaggerates what is
        particular to the class, and two of them are the first code's and the last's, with the codes
        between on a line. What is None is as the run's config has it (a guidance scale or top-p of
        1 does nothing). `prefix` int [p] holds the first codes, in raster order.
        `batch_size` bounds how many images are in flight, in whole micro-batches.
        """
        self._need_prior()
        numbers_of_classes = self.labels(classes)
        if per_class < 1 or not len(numbers_of_classes):
            raise UserError("no classes, or none of each, were asked for.")
        labels = np.repeat(numbers_of_classes, per_class)
        numbers = np.tile(np.arange(per_class, dtype=np.int32), len(numbers_of_classes))
        return np.concatenate(list(self.drawn(
            labels, numbers, temperature=temperature, top_k=top_k, top_p=top_p,
            guidance_scale=guidance_scale, prefix=prefix, seed=seed, devices=devices,
            batch_size=batch_size, progress=progress,
        )))  # fmt: skip

    def drawn(
        self,
        labels: np.ndarray,
        numbers: np.ndarray,
        *,
        prefix: Any = None,
        seed: int = 0,
        devices: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Iterator[np.ndarray]:
        """The images of `sample`, in parts: image `numbers[i]`, int32 [n], of class `labels[i]`,
        int32 [n]; `settings` are those of `sampling`."""
        temperature, top_k, top_p, guidance_scale = self.sampling(**settings, seed=seed)
        given = None if prefix is None else np.asarray(prefix, np.int32)
        if given is not None and (
            given.ndim != 1 or len(given) > self.prior.length
            or (given.size and not 0 <= given.min() <= given.max() < self.prior.codebook_size)
        ):  # fmt: skip
            raise UserError(
                f"a prefix holds at most {self.prior.length} codes from 0 to "
                f"{self.prior.codebook_size - 1}."
            )
        used, draw, params = self._sampler(
            devices, top_k, top_p is not None, guidance_scale is not None, given is not None
        )
        size = MICRO * len(used)
        ends = np.ravel(0.0 if guidance_scale is None else guidance_scale)
        common = used.replicate({
            "seed": np.uint32(seed),
            "settings": np.array([temperature, top_p or 1.0], np.float32),
            "scales": np.linspace(ends[0], ends[-1], self.prior.length, dtype=np.float32),
            "prefix": np.zeros(0, np.int32) if given is None else given,
        })  # fmt: skip
        most, left = -(-(batch_size or 1) // size), len(labels)
        flying: list[jax.Array] = []
        for start in tqdm(
            range(0, len(labels), size), desc="sampling", disable=None if progress else True
        ):
            filled = np.minimum(np.arange(start, start + size), len(labels) - 1)[used.own(size)]
            shards = used.shard({"labels": labels[filled], "numbers": numbers[filled]})
            flying.append(draw(params, shards | common))
            if len(flying) == most or start + size >= len(labels):
                for part in map(used.gather, flying):
                    yield part[:left]
                    left -= len(part)
                flying = []

    def sampling(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> tuple[float, int | None, float | None, float | Sequence[float] | None]:
        """The settings of `sample`, what is None as the run's config has it. UserError where they
        cannot be."""
        self._need_prior()
        preset = self.config.prior
        temperature = preset.temperature if temperature is None else temperature
        top_k = preset.top_k if top_k is None else top_k
        top_p = preset.top_p if top_p is None else top_p
        guidance_scale = preset.guidance_scale if guidance_scale is None else guidance_scale
        check_sampling(
            self.prior.codebook_size, temperature, top_k, top_p, guidance_scale,
            preset.label_dropout,
        )  # fmt: skip
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed is {seed}; it must be from 0 to {2**32 - 1}.")
        return temperature, top_k, top_p, guidance_scale

    def _sampler(
        self, count: int | None, top_k: int | None, use_top_p: bool, use_guidance: bool, given: bool
    ) -> tuple[Devices, Compiled, Any]:
        """The devices, the compiled sampler of one choice of what is compiled in, and the
        parameters there."""
        devices = Devices(count)
        key = (len(devices), top_k, use_top_p, use_guidance, given)
        if key in self._samplers:
            return self._samplers[key]

        def draw(params: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            temperature, top_p = arrays["settings"]
            key, labels, prefix = jax.random.key(arrays["seed"]), arrays["labels"], arrays["prefix"]
            keys = jax.vmap(
                lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i)
            )(labels, arrays["numbers"])  # fmt: skip
            with jax.default_matmul_precision("highest"):
                codes = sample(
                    self.prior, params["transformer"], labels, keys, temperature, top_k,
                    top_p if use_top_p else None, arrays["scales"] if use_guidance else None,
                    jnp.broadcast_to(prefix, (len(labels), len(prefix))) if given else None,
                )  # fmt: skip
                grid = codes.reshape(len(labels), *self.prior.grid)
                return decode_indices(self.model, params["generator"], grid)

        of_one_place = [made for made in self._samplers.values() if len(made[0]) == len(devices)]
        if of_one_place:
            devices, _, params = of_one_place[0]
        else:
            params = {"transformer": self.transformer, "generator": self.params}
            params = devices.replicate(jax.tree.map(np.asarray, params))
        self._samplers[key] = devices, devices.compile(draw), params
        return self._samplers[key]

    def log_likelihood(self, images: Any, labels: Any) -> np.ndarray:
        """The logarithm of the probability, in nats, that the prior gives the codes of images
        [n,h,w,c] of classes int [n] (or names): float32 [n]."""
        self._need_prior()
        numbers = self.labels(np.asarray(labels).tolist())
        if len(numbers) != len(images):
            raise UserError(f"{len(images)} images and {len(numbers)} labels were given.")
        return self.code_likelihood(self.encode(images), numbers)

    def code_likelihood(self, indices: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The same of code indices int32 [n,h',w'] and classes int32 [n]."""
        self._need_prior()
        codes = indices.reshape(len(indices), -1)
        both = np.concatenate([numbers[:, None], codes], 1)
        return self._batched(self._likelihood, both, self.transformer)

    def _of_codes(self, params: Any, both: jax.Array) -> jax.Array:
        """Log-likelihoods [b] of rows of a class and its codes [b,1+t]."""
        codes = both[:, 1:]
        tokens = teacher_forced(self.prior, both[:, 0], codes)
        logits = cast(jax.Array, self.prior.apply({"params": params}, tokens))
        return -next_token(logits, codes) * self.prior.length

    def evaluate(
        self,
        *,
        devices: int | None = None,
        progress: bool = False,
        sweep: Any = (),
        **protocol: Any,
    ) -> dict[str, Any]:
        """The report of docs/evaluation.md: reconstructions of a split's images, and new images
        where there is a prior, under a protocol (see `evaluation.protocol.Protocol`, whose settings
        these are: `split="test", samples=5000`, …)."""
        from taming_jax.evaluation.protocol import Protocol
        from taming_jax.evaluation.report import finished
        from taming_jax.evaluation.subject import Evaluation

        return finished(Evaluation(self, Protocol(**protocol), devices, progress, sweep))

    def tokens(self, split: str = "train") -> Split:
        """A split of the run's dataset as codes, unsigned [n, h' * w'], not augmented, with its
        labels: read from the run's folder, or encoded into it."""
        splits = sources.load(self.config.data)
        if split not in ("train", "validation", "test"):
            raise UserError(f"there is no split '{split}'; take train, validation or test.")
        params = jax.tree.map(np.asarray, self.params)
        folder = self.workdir / "tokens"
        tokenizer = Tokenizer(folder, self.model, params, self.config, Devices(1))
        return tokenizer(split, getattr(splits, split))

    def encode(self, images: Any) -> np.ndarray:
        """Images to code indices, int32 [n,h',w']. UserError for other shapes and types."""
        images = np.asarray(images)
        size, channels = self.config.data.image_size, self.config.data.channels
        if images.ndim != 4 or images.shape[1:] != (size, size, channels):
            raise UserError(
                f"images of shape {images.shape} were given; this run takes "
                f"[n, {size}, {size}, {channels}]."
            )
        if images.dtype == np.uint8:
            images = images / np.float32(127.5) - 1
        elif not np.issubdtype(images.dtype, np.floating):
            raise UserError(
                f"images of type {images.dtype} were given; this run takes uint8, or floats in "
                "[-1, 1]."
            )
        elif not np.abs(images).max(initial=0) <= 1.001:
            raise UserError(
                "images of type float must lie in [-1, 1]; others, or NaN, were given. Pass uint8, "
                "or images / 127.5 - 1."
            )
        return self._batched(self._encode, images.astype(np.float32))

    def decode(self, indices: Any) -> np.ndarray:
        """Code indices int [n,h',w'], a grid of any size, to images float32 [n,h,w,c] in [-1, 1].
        UserError for other types and codes that do not exist."""
        indices, codes = np.asarray(indices), self.config.vqgan.codes
        if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
            raise UserError(
                f"indices of shape {indices.shape} and type {indices.dtype} were given; this run "
                "takes integers [n, h', w']."
            )
        if not indices.size:
            raise UserError("no codes were given.")
        if indices.min() < 0 or indices.max() >= codes:
            raise UserError(f"indices go from 0 to {codes - 1}; others were given.")
        return self._batched(self._decode, indices.astype(np.int32))

    def reconstruct(self, images: Any) -> np.ndarray:
        """Images through the codes and back, uint8 as uint8 and floats as float32. UserError as
        `encode`."""
        images = np.asarray(images)
        reconstruction = self.decode(self.encode(images))
        if images.dtype == np.uint8:
            return np.rint((reconstruction + 1) * 127.5).astype(np.uint8)
        return reconstruction

    def _batched(self, function: Callable, values: np.ndarray, params: Any = None) -> np.ndarray:
        """Applies a compiled function in batches of one size, so that it is compiled once."""
        if not len(values):
            raise UserError("nothing was given: the first dimension is 0.")
        params = self.params if params is None else params
        many = images_at_once(self.config, BATCH)
        size = many if len(values) > FEW else min(FEW, many)
        parts = []
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(values), size):
                part = values[start : start + size]
                filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
                parts.append(np.asarray(function(params, filled))[: len(part)])
        return np.concatenate(parts)
