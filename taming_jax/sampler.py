"""Sampling of images from a run's prior on several devices, compiled once per combination of static
settings."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.config.serialization import from_dict
from taming_jax.config.validation import check_ranges, check_sampling
from taming_jax.data.datasets import parse_classes
from taming_jax.errors import UserError
from taming_jax.models.vqgan import VQGAN, decode_indices, max_batch
from taming_jax.parallel.devices import Compiled, Devices
from taming_jax.priors.decoding import Samples, sample_keys, sampling_batch_size
from taming_jax.priors.registry import Prior
from taming_jax.progress import Progress

# The sampling settings of all kinds of priors.
SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")
Classes = int | str | Iterable[int | str]


class Drawing(NamedTuple):
    """Images to draw: image number `numbers[i]` of class `labels[i]`, both int32 [n].

    `known` int [n,t] holds known codes in raster order, -1 for codes to draw. `size` is the height
    and width in pixels. Default: the training size.
    """

    labels: np.ndarray
    numbers: np.ndarray
    known: np.ndarray | None = None
    size: tuple[int, int] | None = None

    def select(self, rows: np.ndarray) -> "Drawing":
        """Returns some of the images."""
        known = None if self.known is None else self.known[rows]
        return Drawing(self.labels[rows], self.numbers[rows], known, self.size)


class Drawn(NamedTuple):
    """A batch of images float [b,h,w,c] in [-1, 1], their codes int32 [b,h',w'], and the passes
    that drew the codes; see `Samples`."""

    images: np.ndarray
    codes: np.ndarray
    passes: np.ndarray


class Sampler:
    """A sampler that draws codes from a prior and decodes them, on any number of devices."""

    def __init__(
        self,
        config: Config,
        prior: Prior,
        class_names: Sequence[str],
        generator: VQGAN,
        params: dict[str, Any],
        decode: Callable[[np.ndarray], np.ndarray],
    ):
        """`decode` decodes the codes of images larger than the training images."""
        self._defaults, self.factor, self._decode = config.prior, config.downsample_factor, decode
        self.prior, self.generator, self.params = prior, generator, params
        self.class_names = class_names
        self._place_once = functools.cache(self._place)
        # Settings that are compiled in, such as top-k, may vary without end in a long session.
        self._compile_once = functools.lru_cache(16)(self._compile)

    def resolve_settings(self, seed: int = 0, **settings: Any) -> dict[str, Any]:
        """Returns the sampling settings, with those of the run's config instead of None. Raises
        UserError if one of them or the seed is invalid, or does not apply to this kind of prior."""
        prior, kind = self._defaults, self._defaults.kind_settings
        names = kind.decoding if kind is not None else ()
        values = {name: getattr(prior, name) for name in SAMPLING}
        values |= {name: getattr(kind, name) for name in names}
        for name, value in settings.items():
            if value is None:
                continue
            if name not in values:
                others = ", ".join(other.replace("_", "-") for other in values)
                raise UserError(
                    f"the prior {prior.kind} has no sampling setting {name.replace('_', '-')}; it "
                    f"has {others}."
                )
            is_real = name != "guidance_scale" and isinstance(values[name], float)
            values[name] = float(value) if is_real or name == "top_p" else value
        check_sampling(values, self.prior.codebook_size, prior.label_dropout)
        if kind is not None:
            own = dataclasses.asdict(kind) | {name: values[name] for name in names}
            check_ranges(from_dict(type(kind), own))  # raises UserError for wrong types, too
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed is {seed}; it must be from 0 to {2**32 - 1}.")
        return values

    def compute_grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Returns the grid of codes for images of a size in pixels, or of the training size if it
        is None. Raises UserError if the size is invalid or too small."""
        if size is None:
            return self.prior.grid
        factor, window = self.factor, self.prior.window
        if np.shape(size) != (2,) or any(
            pixels % factor or pixels < codes * factor
            for pixels, codes in zip(size, window, strict=True)
        ):
            raise UserError(
                f"the size is {size}; it must be a height and a width in pixels that are multiples "
                f"of {factor}, and at least {window[0] * factor} and {window[1] * factor}."
            )
        return int(size[0]) // factor, int(size[1]) // factor

    def plan_samples(
        self,
        classes: Classes,
        per_class: int,
        prefix: Any = None,
        size: tuple[int, int] | None = None,
    ) -> Drawing:
        """Returns the images that `Run.sample` draws. Raises UserError if an argument is
        invalid."""
        class_labels = parse_classes(classes, self.class_names)
        n = len(class_labels)
        if per_class < 1 or not n:
            raise UserError(
                f"there is nothing to draw: {per_class} images of {n} classes; choose at least one."
            )
        labels, known = np.repeat(class_labels, per_class), None
        if prefix is not None:
            codes = np.asarray(prefix)
            if codes.ndim != 1 or (codes < 0).any():
                raise UserError("a prefix must be a one-dimensional array of nonnegative codes.")
            known = np.broadcast_to(codes, (len(labels), len(codes)))
        return Drawing(labels, np.tile(np.arange(per_class, dtype=np.int32), n), known, size)

    def plan_completions(
        self, codes: np.ndarray, classes: Classes | None, per_image: int, keep: float, mask: Any
    ) -> Drawing:
        """Returns the images that `Run.complete` draws, given the codes int32 [n,h',w'] of the
        images to complete. Raises UserError if an argument is invalid."""
        n, height, width = codes.shape
        labels = self.resolve_labels(classes, n)
        kept = make_keep_mask(keep, mask, (height, width), self.factor)
        if per_image < 1:
            raise UserError(
                f"there is nothing to draw: {per_image} completions per image; choose at least one."
            )
        known = np.where(kept, codes, -1).reshape(n, -1)
        return Drawing(
            np.repeat(labels, per_image), np.tile(np.arange(per_image, dtype=np.int32), n),
            np.repeat(known, per_image, 0), (height * self.factor, width * self.factor),
        )  # fmt: skip

    def resolve_labels(self, classes: Classes | None, n: int) -> np.ndarray:
        """Returns the labels of n images, int32 [n]. None means no class. Raises UserError if the
        number of classes is neither 1 nor n, or if the prior needs a class."""
        if classes is None:
            null_label = 0 if self.prior.classes == 1 else self.prior.classes
            if null_label and not self._defaults.label_dropout:
                raise UserError(
                    "this prior was trained without --prior.label-dropout, so it cannot draw "
                    "images without a class; name their classes."
                )
            return np.full(n, null_label, np.int32)
        labels = parse_classes(classes, self.class_names)
        if len(labels) not in (1, n):
            raise UserError(
                f"there are {n} images and {len(labels)} classes; pass one class for all, or one "
                "per image."
            )
        return np.broadcast_to(labels, n)

    def draw(self, drawing: Drawing, **settings: Any) -> Iterator[np.ndarray]:
        """Yields the images in batches; see `Run.sample` for the settings."""
        for batch in self.draw_with_codes(drawing, **settings):
            yield batch.images

    def draw_with_codes(
        self,
        drawing: Drawing,
        *,
        seed: int = 0,
        devices: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Iterator[Drawn]:
        """Does the same as `draw`, but yields the images with their codes."""
        if batch_size is not None and batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; it must be 1 or more.")
        values = self.resolve_settings(**settings, seed=seed)
        labels, numbers, known, size = drawing
        grid, n = self.compute_grid(size), len(labels)
        length, codes = grid[0] * grid[1], self.prior.codebook_size
        known = np.empty((n, 0), np.int32) if known is None else known
        if known.shape[1] > length or not all(-1 <= x < codes for x in np.unique(known)):
            raise UserError(f"a prefix must hold at most {length} codes from 0 to {codes - 1}.")
        self.prior.check_drawing(grid, known)
        device_group, params = self._place_once(devices)
        scales = values.pop("guidance_scale")
        if scales is not None:
            ends = np.ravel(scales)
            scales = np.linspace(ends[0], ends[-1], length, dtype=np.float32)
        # Real numbers are arguments of the compiled program. Other settings are compiled into it.
        reals = {name: np.float32(x) for name, x in values.items() if isinstance(x, float)}
        static = tuple((name, x) for name, x in values.items() if name not in reals)
        draw = self._compile_once(devices, grid, static)
        micro_batch_size = sampling_batch_size(device_group.list[0], self.prior.logits_per_image)
        if grid != self.prior.grid:
            micro_batch_size = max_batch(length * self.factor**2, micro_batch_size)
        batch = micro_batch_size * len(device_group)
        shared = device_group.replicate({"seed": np.uint32(seed), "scales": scales, "reals": reals})
        max_waiting, remaining = -(-(batch_size or 1) // batch), n
        if grid != self.prior.grid:
            max_waiting -= 1  # else, the decoder would wait for the micro-batch that is drawn ahead
        pending: collections.deque[tuple[jax.Array | None, Samples]] = collections.deque()

        def fetch() -> Drawn:
            nonlocal remaining
            images, (codes, passes) = jax.tree.map(
                lambda x: device_group.gather(x)[:remaining], pending.popleft()
            )
            remaining -= len(codes)
            return Drawn(self._decode(codes) if images is None else images, codes, passes)

        with Progress("sampling", n, "images", enabled=progress) as bar:
            for start in range(0, n, batch):
                rows = np.minimum(np.arange(start, start + batch), n - 1)
                known_codes = np.full((batch, length), -1, np.int32)
                known_codes[:, : known.shape[1]] = known[rows]
                shards = device_group.shard({
                    "labels": labels[rows], "numbers": numbers[rows], "known": known_codes
                })  # fmt: skip
                pending.append(draw(params, shards | shared))
                # While the host fetches a micro-batch, the devices draw the next one.
                is_last = start + batch >= n
                while pending and (is_last or len(pending) > max_waiting):
                    yield (drawn := fetch())
                    bar.update(len(drawn.codes))

    def _place(self, count: int | None) -> tuple[Devices, Any]:
        """Returns `count` devices, and the parameters replicated over them."""
        devices = Devices(count)
        return devices, devices.replicate(jax.tree.map(np.asarray, self.params))

    def _compile(
        self, count: int | None, grid: tuple[int, int], settings: tuple[tuple[str, Any], ...]
    ) -> Compiled:
        """Compiles a function that draws codes with sampling settings that are not real numbers,
        and also returns their images [b,h,w,c], or None if the grid is larger than the training
        images'."""
        prior, generator = self.prior, self.generator

        def draw(params: Any, arrays: dict[str, Any]) -> tuple[jax.Array | None, Samples]:
            labels = arrays["labels"]
            keys = sample_keys(arrays["seed"], labels, arrays["numbers"])
            samples = prior.sample(
                params["transformer"], labels, keys, guidance_scale=arrays["scales"],
                known=arrays["known"], grid=grid, **arrays["reals"], **dict(settings),
            )  # fmt: skip
            if grid != prior.grid:
                return None, samples
            return decode_indices(generator, params["generator"], samples.codes), samples

        return self._place_once(count)[0].compile(draw)


def make_keep_mask(keep: float, mask: Any, grid: tuple[int, int], factor: int) -> np.ndarray:
    """Returns a mask of the codes to keep, bool [h',w']; see `Run.complete`. Raises UserError if
    `keep` or the shape of `mask` is invalid."""
    if mask is None:
        rows = round(keep * grid[0]) if 0 < keep < 1 else 0
        if not 0 < rows < grid[0]:
            raise UserError(
                f"keep is {keep}; it must be a fraction between 0 and 1 for which at least one of "
                f"the {grid[0]} rows of codes is kept and at least one is drawn."
            )
        return np.broadcast_to(np.arange(grid[0])[:, None] < rows, grid)
    mask = np.asarray(mask, bool)
    if mask.shape == tuple(size * factor for size in grid):
        # A code is kept if more than half of its pixels are.
        mask = mask.reshape(grid[0], factor, grid[1], factor).mean((1, 3)) > 0.5
    if mask.shape != grid:
        raise UserError(
            f"the mask is {'x'.join(map(str, mask.shape))}; it must be {grid[0]}x{grid[1]} codes, "
            f"or {grid[0] * factor}x{grid[1] * factor} pixels."
        )
    return mask
