"""Images larger than memory takes at once, encoded and decoded in tiles that overlap. The networks
normalise and attend over all they are given, so that a tile's codes are near those of the whole
image, and not the same."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from taming_jax.errors import UserError
from taming_jax.models.vqgan import PIXELS

Function = Callable[[np.ndarray], np.ndarray]


def side_of(size: Sequence[int], tile: int | None, factor: int) -> int | None:
    """The side, in codes, of the tiles for images of a size in pixels: that of `tile` pixels, or
    None where images are small enough to be taken as they are. UserError for other tiles."""
    whole = tile is None or isinstance(tile, int | np.integer)
    if tile is not None and (not whole or tile < 4 * factor or tile % factor):
        raise UserError(
            f"tiles of {tile} pixels were asked for; take a multiple of {factor}, {4 * factor} or "
            "more."
        )
    if tile is None and size[0] * size[1] <= PIXELS:
        return None
    return (tile or math.isqrt(PIXELS)) // factor


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis, so that they cover it and overlap at least so far."""
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def places(shape: tuple[int, int], tile: int) -> Iterator[tuple[slice, slice]]:
    """The tiles of a grid, a quarter of which overlaps with the next."""
    rows, columns = (starts(size, tile, tile // 4) for size in shape)
    for row in rows:
        for column in columns:
            yield slice(row, row + tile), slice(column, column + tile)


def nearness(place: slice, size: int) -> np.ndarray:
    """How far each entry of a tile is from its nearest edge, of those that are not the grid's,
    float [tile]."""
    start, stop = place.start, min(place.stop, size)
    at = np.arange(start, stop)
    before = at - start + 1.0 if start else np.full(len(at), np.inf)
    after = stop - at + 0.0 if stop < size else np.full(len(at), np.inf)
    return np.minimum(np.minimum(before, after), float(size))


def encoded(encode: Function, images: np.ndarray, factor: int, tile: int | None) -> np.ndarray:
    """Codes int32 [n,h/factor,w/factor] of images [n,h,w,c], by tiles of so many pixels a side (see
    `side_of`): each code from the tile in whose middle it is nearest to be."""
    n, height, width = images.shape[:3]
    grid, side = (height // factor, width // factor), side_of((height, width), tile, factor)
    if side is None:
        return encode(images)
    codes, best = np.zeros((n, *grid), np.int32), np.zeros(grid)
    for rows, columns in places(grid, side):
        pixels = [slice(s.start * factor, s.stop * factor) for s in (rows, columns)]
        found = encode(images[:, pixels[0], pixels[1]])
        near = np.minimum.outer(nearness(rows, grid[0]), nearness(columns, grid[1]))
        better = near > best[rows, columns]
        codes[:, rows, columns] = np.where(better, found, codes[:, rows, columns])
        best[rows, columns] = np.maximum(best[rows, columns], near)
    return codes


def decoded(decode: Function, codes: np.ndarray, factor: int, tile: int | None) -> np.ndarray:
    """Images float32 [n,h*factor,w*factor,c] of codes [n,h,w], by tiles of so many pixels a side
    (see `side_of`), which run into one another where they overlap."""
    n, *grid = codes.shape
    side = side_of([size * factor for size in grid], tile, factor)
    if side is None:
        return decode(codes)
    total, weights = None, np.zeros([size * factor for size in grid], np.float32)
    for rows, columns in places((grid[0], grid[1]), side):
        found = decode(codes[:, rows, columns])
        pixels = [slice(s.start * factor, s.stop * factor) for s in (rows, columns)]
        near = np.multiply.outer(*(
            np.minimum(nearness(place, size * factor), side * factor / 4)
            for place, size in zip(pixels, grid, strict=True)
        )).astype(np.float32)  # fmt: skip
        if total is None:
            total = np.zeros((n, *weights.shape, found.shape[-1]), np.float32)
        total[:, pixels[0], pixels[1]] += found * near[..., None]
        weights[pixels[0], pixels[1]] += near
    assert total is not None
    return total / weights[..., None]
