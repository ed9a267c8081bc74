"""A run's prior as a source of images: compiled once for each choice of what is compiled in, and
shared over the devices."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.config.validation import check_sampling
from taming_jax.errors import UserError
from taming_jax.models.vqgan import VQGAN, decode_indices, images_at_once
from taming_jax.parallel.devices import Compiled, Devices
from taming_jax.priors.decoding import micro_batch, sample_keys
from taming_jax.priors.registry import Prior
from taming_jax.progress import Progress


class Settings(NamedTuple):
    """How codes are drawn; see `Run.sample`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float | Sequence[float] | None


class Sampler:
    """Draws images of a run's config by its prior and generator, on any number of devices."""

    def __init__(
        self,
        config: Config,
        prior: Prior,
        generator: VQGAN,
        params: dict[str, Any],
        decode: Callable[[np.ndarray], np.ndarray],
    ):
        """`decode` makes images from grids of codes larger than those of the training images."""
        self.preset, self.factor, self._decode = config.prior, config.downsample_factor, decode
        self.prior, self.generator, self.params = prior, generator, params
        self._placed = functools.cache(self._place)
        self._compiled = functools.cache(self._compile)

    def settings(self, seed: int = 0, **given: Any) -> Settings:
        """What is None as the run's config has it. UserError where the settings cannot be."""
        preset = Settings(*(getattr(self.preset, name) for name in Settings._fields))
        settings = preset._replace(**{k: value for k, value in given.items() if value is not None})
        check_sampling(settings, self.prior.codebook_size, self.preset.label_dropout)
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed is {seed}; it must be from 0 to {2**32 - 1}.")
        return settings

    def grid_of(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The grid of images of a size in pixels. UserError where it is none, or too small."""
        if size is None:
            return self.prior.grid
        factor, window = self.factor, self.prior.window
        if np.shape(size) != (2,) or any(
            pixels % factor or pixels < codes * factor
            for pixels, codes in zip(size, window, strict=True)
        ):
            raise UserError(
                f"a size of {size} was asked for; it is a height and a width in pixels, multiples "
                f"of a code's {factor}, and at least the {window[0] * factor} and "
                f"{window[1] * factor} of the images this prior was trained on."
            )
        return int(size[0]) // factor, int(size[1]) // factor

    def drawn(
        self,
        labels: np.ndarray,
        numbers: np.ndarray,
        *,
        known: np.ndarray | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        devices: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Iterator[np.ndarray]:
        """See `Run.drawn`."""
        if batch_size is not None and batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; it must be 1 or more.")
        temperature, top_k, top_p, guidance_scale = self.settings(**settings, seed=seed)
        grid, n = self.grid_of(size), len(labels)
        length, codes = grid[0] * grid[1], self.prior.codebook_size
        given = np.full((n, length), -1, np.int32)
        if known is not None:
            if np.shape(known)[1] > length or not all(-1 <= x < codes for x in np.unique(known)):
                raise UserError(f"a prefix holds at most {length} codes from 0 to {codes - 1}.")
            given[:, : known.shape[1]] = known
        (used, params), draw = self._placed(devices), self._compiled(devices, top_k, grid)
        micro = micro_batch(used.list[0])
        if grid != self.prior.grid:
            micro = images_at_once(length * self.factor**2, micro)
        batch = micro * len(used)
        scales = None
        if guidance_scale is not None:
            ends = np.ravel(guidance_scale)
            scales = np.linspace(ends[0], ends[-1], length, dtype=np.float32)
        common = used.replicate({
            "seed": np.uint32(seed), "temperature": np.float32(temperature),
            "top_p": None if top_p is None else np.float32(top_p), "scales": scales,
        })  # fmt: skip
        most, left = -(-(batch_size or 1) // batch), n
        flying: list[jax.Array] = []
        with Progress("sampling", n, "images", enabled=progress) as shown:
            for start in range(0, n, batch):
                rows = np.minimum(np.arange(start, start + batch), n - 1)
                shards = used.shard({
                    "labels": labels[rows], "numbers": numbers[rows], "known": given[rows]
                })  # fmt: skip
                flying.append(draw(params, shards | common))
                if len(flying) == most or start + batch >= n:
                    for part in map(used.gather, flying):
                        part = part[:left]
                        yield part if grid == self.prior.grid else self._decode(part)
                        shown.update(len(part))
                        left -= len(part)
                    flying = []

    def _place(self, count: int | None) -> tuple[Devices, Any]:
        """So many devices, and the parameters there."""
        devices = Devices(count)
        return devices, devices.replicate(jax.tree.map(np.asarray, self.params))

    def _compile(self, count: int | None, top_k: int | None, grid: tuple[int, int]) -> Compiled:
        """A function that draws images [b,h,w,c]; of a larger grid than the training images', codes
        [b,h',w']."""
        prior, generator = self.prior, self.generator

        def draw(params: Any, arrays: dict[str, Any]) -> jax.Array:
            labels = arrays["labels"]
            keys = sample_keys(arrays["seed"], labels, arrays["numbers"])
            with jax.default_matmul_precision("highest"):
                codes = prior.sample(
                    params["transformer"], labels, keys, temperature=arrays["temperature"],
                    top_k=top_k, top_p=arrays["top_p"], guidance_scale=arrays["scales"],
                    known=arrays["known"], grid=grid,
                )  # fmt: skip
                if grid != prior.grid:
                    return codes
                return decode_indices(generator, params["generator"], codes)

        return self._placed(count)[0].compile(draw)


def kept_codes(keep: float, mask: Any, grid: tuple[int, int], factor: int) -> np.ndarray:
    """Which codes of a grid are kept, bool [h',w']: see `Run.complete`."""
    if mask is None:
        rows = round(keep * grid[0]) if 0 < keep < 1 else 0
        if not 0 < rows < grid[0]:
            raise UserError(
                f"a share of {keep} of {grid[0]} rows of codes leaves nothing to keep or "
                "nothing to draw; it is between 0 and 1."
            )
        return np.broadcast_to(np.arange(grid[0])[:, None] < rows, grid)
    mask = np.asarray(mask, bool)
    if mask.shape == tuple(size * factor for size in grid):
        # A code is kept where more than half of its pixels are.
        mask = mask.reshape(grid[0], factor, grid[1], factor).mean((1, 3)) > 0.5
    if mask.shape != grid:
        raise UserError(
            f"a mask of {'x'.join(map(str, mask.shape))} was given; it is of "
            f"{grid[0]}x{grid[1]} codes, or of {grid[0] * factor}x{grid[1] * factor} pixels."
        )
    return mask
