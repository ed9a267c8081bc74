"""A run's prior as a source of images: compiled once for each choice of what is compiled in, and
shared over the devices."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from taming_jax.config.schema import Config
from taming_jax.config.validation import check_sampling
from taming_jax.errors import UserError
from taming_jax.models.vqgan import VQGAN, decode_indices, images_at_once
from taming_jax.parallel.devices import Compiled, Devices
from taming_jax.priors.autoregressive import GPT
from taming_jax.priors.decoding import micro_batch, sample, sample_keys, sample_windows
from taming_jax.progress import Progress


class Settings(NamedTuple):
    """How codes are drawn; see `Run.sample`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float | Sequence[float] | None


class Choice(NamedTuple):
    """What is compiled into a sampler."""

    devices: int
    top_k: int | None
    use_top_p: bool
    use_guidance: bool
    grid: tuple[int, int]
    known: int  # so many codes


class Sampler:
    """Draws images of a run's config by its prior and generator. `decode` makes pictures of grids
    that are too large to be decoded where they are drawn."""

    def __init__(
        self,
        config: Config,
        prior: GPT,
        generator: VQGAN,
        params: dict[str, Any],
        decode: Callable[[np.ndarray], np.ndarray],
    ):
        self.preset, self.factor = config.prior, config.downsample_factor
        self.prior, self.generator, self.params, self.decode = prior, generator, params, decode
        self._compiled: dict[Choice, tuple[Devices, Compiled, Any]] = {}

    def settings(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> Settings:
        """What is None as the run's config has it. UserError where the settings cannot be."""
        preset = self.preset
        found = Settings(
            preset.temperature if temperature is None else temperature,
            preset.top_k if top_k is None else top_k,
            preset.top_p if top_p is None else top_p,
            preset.guidance_scale if guidance_scale is None else guidance_scale,
        )
        check_sampling(self.prior.codebook_size, *found, preset.label_dropout)
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed is {seed}; it must be from 0 to {2**32 - 1}.")
        return found

    def known_of(self, prefix: Any, n: int) -> np.ndarray:
        """The first codes [p] of n images, int32 [n,p]. UserError for what is none."""
        codes = np.asarray(prefix)
        if codes.ndim != 1 or (codes.size and codes.min() < 0):
            raise self._no_prefix(self.prior.length)
        return np.broadcast_to(codes.astype(np.int32), (n, len(codes)))

    def _no_prefix(self, length: int) -> UserError:
        last = self.prior.codebook_size - 1
        return UserError(f"a prefix holds at most {length} codes from 0 to {last}.")

    def grid_of(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The grid of images of a size in pixels. UserError where it is none, or too small."""
        if size is None:
            return self.prior.grid
        factor, window = self.factor, self.prior.window
        if np.shape(size) != (2,) or not all(isinstance(n, int | np.integer) for n in size):
            raise UserError(
                f"a size of {size} was asked for; it is a height and a width in pixels."
            )
        if any(pixels % factor for pixels in size):
            near = [max(round(pixels / factor), 1) * factor for pixels in size]
            raise UserError(
                f"a height of {size[0]} and a width of {size[1]} were asked for, and both are "
                f"multiples of a code's {factor}; take {near[0]} and {near[1]}."
            )
        grid = size[0] // factor, size[1] // factor
        if grid[0] < window[0] or grid[1] < window[1]:
            least = [codes * factor for codes in window]
            raise UserError(
                f"a height of {size[0]} and a width of {size[1]} are less than the {least[0]} and "
                f"{least[1]} of the images this prior was trained on."
            )
        return grid

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
        temperature, top_k, top_p, guidance_scale = self.settings(**settings, seed=seed)
        grid, codes = self.grid_of(size), self.prior.codebook_size
        length = grid[0] * grid[1]
        if known is not None and (
            known.ndim != 2 or known.shape[1] > length
            or (known.size and not -1 <= known.min() <= known.max() < codes)
        ):  # fmt: skip
            raise self._no_prefix(length)
        held = 0 if known is None else known.shape[1]
        choice = (top_k, top_p is not None, guidance_scale is not None, grid, held)
        used, draw, params = self._compile(devices, choice)
        whole, micro = grid == self.prior.grid, micro_batch(used.list[0])
        if not whole:
            micro = images_at_once(length * self.factor**2, micro)
        batch = micro * len(used)
        ends = np.ravel(0.0 if guidance_scale is None else guidance_scale)
        common = used.replicate({
            "seed": np.uint32(seed),
            "settings": np.array([temperature, top_p or 1.0], np.float32),
            "scales": np.linspace(ends[0], ends[-1], length, dtype=np.float32),
        })  # fmt: skip
        given = np.zeros((len(labels), 0), np.int32) if known is None else known.astype(np.int32)
        most, left = -(-(batch_size or 1) // batch), len(labels)
        flying: list[jax.Array] = []
        with Progress("sampling", len(labels), "images", enabled=progress) as shown:
            for start in range(0, len(labels), batch):
                places = np.minimum(np.arange(start, start + batch), len(labels) - 1)
                own = places[used.own(batch)]
                shards = used.shard({
                    "labels": labels[own], "numbers": numbers[own], "known": given[own]
                })  # fmt: skip
                flying.append(draw(params, shards | common))
                if len(flying) == most or start + batch >= len(labels):
                    for part in map(used.gather, flying):
                        yield self._finished(part[:left], whole)
                        shown.update(len(part))
                        left -= len(part)
                    flying = []

    def _finished(self, part: np.ndarray, whole: bool) -> np.ndarray:
        """Images of what was drawn: itself, but for grids that are larger than the training
        images', of which it is the codes."""
        return part if whole else self.decode(part)

    def _compile(self, count: int | None, settings: tuple) -> tuple[Devices, Compiled, Any]:
        """The devices, the compiled sampler of one choice of what is compiled in, and the
        parameters there."""
        devices = Devices(count)
        choice = Choice(len(devices), *settings)
        if choice in self._compiled:
            return self._compiled[choice]
        prior, generator = self.prior, self.generator
        windows = choice.grid != prior.grid or prior.window != prior.grid

        def draw(params: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            temperature, top_p = arrays["settings"]
            labels, known = arrays["labels"], arrays["known"]
            keys = sample_keys(arrays["seed"], labels, arrays["numbers"])
            settings: dict[str, Any] = {
                "temperature": temperature, "top_k": choice.top_k,
                "top_p": top_p if choice.use_top_p else None,
                "guidance_scale": arrays["scales"] if choice.use_guidance else None,
                "known": known if choice.known else None,
            }  # fmt: skip
            with jax.default_matmul_precision("highest"):
                transformer = params["transformer"]
                if windows:
                    codes = sample_windows(
                        prior, transformer, labels, keys, choice.grid, **settings
                    )
                else:
                    codes = sample(prior, transformer, labels, keys, **settings)
                grids = codes.reshape(len(labels), *choice.grid)
                if choice.grid != prior.grid:
                    return grids
                return decode_indices(generator, params["generator"], grids)

        of_one_place = [made for made in self._compiled.values() if len(made[0]) == len(devices)]
        if of_one_place:
            devices, _, params = of_one_place[0]
        else:
            params = devices.replicate(jax.tree.map(np.asarray, self.params))
        self._compiled[choice] = devices, devices.compile(draw), params
        return self._compiled[choice]


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
