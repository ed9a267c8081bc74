"""A run's prior as a source of images: compiled once for each choice of what is compiled in, and
shared over the devices."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from taming_jax.checks import check_sampling
from taming_jax.errors import UserError
from taming_jax.models.vqgan import decode_indices, images_at_once
from taming_jax.sampling import sample, sample_windows
from taming_jax.train.devices import Compiled, Devices

if TYPE_CHECKING:
    from taming_jax.run import Run

MICRO = 32  # images a device draws at once: another size would round otherwise, and turn a code


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
    """Draws a run's images."""

    def __init__(self, run: "Run"):
        self.run, self.prior = run, run.prior
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
        preset = self.run.config.prior
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

    def labels_of(self, classes: int | str | Iterable[int | str] | None, n: int) -> np.ndarray:
        """The classes of n images, int32 [n]: one of all, or one of each, or none of any."""
        if classes is None:
            none = 0 if self.prior.classes == 1 else self.prior.classes
            if none and not self.run.config.prior.label_dropout:
                raise UserError(
                    "this prior does not know images of no class (it was trained without "
                    "--prior.label-dropout); name theirs."
                )
            return np.full(n, none, np.int32)
        labels = self.run.labels(classes)
        if len(labels) not in (1, n):
            raise UserError(f"{n} images and {len(labels)} classes were given.")
        return np.broadcast_to(labels, n)

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
        factor, window = self.run.factor, self.prior.window
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
        whole = grid == self.prior.grid
        micro = MICRO if whole else images_at_once(length * self.run.factor**2, MICRO)
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
        for start in tqdm(
            range(0, len(labels), batch), desc="sampling", disable=None if progress else True
        ):
            filled = np.minimum(np.arange(start, start + batch), len(labels) - 1)[used.own(batch)]
            shards = used.shard({
                "labels": labels[filled], "numbers": numbers[filled], "known": given[filled]
            })  # fmt: skip
            flying.append(draw(params, shards | common))
            if len(flying) == most or start + batch >= len(labels):
                for part in map(used.gather, flying):
                    yield self._finished(part[:left], whole)
                    left -= len(part)
                flying = []

    def _finished(self, part: np.ndarray, whole: bool) -> np.ndarray:
        """Images of what was drawn: itself, but for grids that are larger than the training
        images', of which it is the codes."""
        return part if whole else self.run.decode(part)

    def _compile(self, count: int | None, settings: tuple) -> tuple[Devices, Compiled, Any]:
        """The devices, the compiled sampler of one choice of what is compiled in, and the
        parameters there."""
        devices = Devices(count)
        choice = Choice(len(devices), *settings)
        if choice in self._compiled:
            return self._compiled[choice]
        prior, model = self.prior, self.run.model
        windows = choice.grid != prior.grid or prior.window != prior.grid

        def draw(params: Any, arrays: dict[str, jax.Array]) -> jax.Array:
            temperature, top_p = arrays["settings"]
            key, labels, known = jax.random.key(arrays["seed"]), arrays["labels"], arrays["known"]
            keys = jax.vmap(
                lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i)
            )(labels, arrays["numbers"])  # fmt: skip
            settings = {
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
                return decode_indices(model, params["generator"], grids)

        of_one_place = [made for made in self._compiled.values() if len(made[0]) == len(devices)]
        if of_one_place:
            devices, _, params = of_one_place[0]
        else:
            params = {"transformer": self.run.transformer, "generator": self.run.params}
            params = devices.replicate(jax.tree.map(np.asarray, params))
        self._compiled[choice] = devices, devices.compile(draw), params
        return self._compiled[choice]
