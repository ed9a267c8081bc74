"""Images larger than memory takes at once, encoded and decoded in tiles that overlap. The networks
normalise and attend over all they are given, so that a tile's codes are near those of the whole
image, and not the same."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from taming_jax.errors import UserError
from taming_jax.models.vqgan import PIXELS

Function = Callable[[np.ndarray], np.ndarray]
Place = tuple[slice, slice]  # the rows and the columns of a tile


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


def places(shape: Sequence[int], tile: int) -> Iterator[Place]:
    """The tiles of a grid, a quarter of which overlaps with the next."""
    rows, columns = (starts(size, tile, tile // 4) for size in shape)
    for row in rows:
        for column in columns:
            yield slice(row, row + tile), slice(column, column + tile)


def in_pixels(place: Place, factor: int) -> Place:
    """Returns the pixels of a tile of codes."""
    rows, columns = (slice(part.start * factor, part.stop * factor) for part in place)
    return rows, columns


def center_weights(shape: Sequence[int]) -> np.ndarray:
    """Returns a weight for each entry of a tile, which grows from the edges to the center."""
    each = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in shape)
    return np.multiply.outer(*each).astype(np.float32)


def encoded(encode: Function, images: np.ndarray, factor: int, tile: int | None) -> np.ndarray:
    """Codes int32 [n,h/factor,w/factor] of images [n,h,w,c], by tiles of so many pixels a side (see
    `side_of`). Each code comes from the tile whose center is nearest."""
    n, height, width = images.shape[:3]
    grid, side = (height // factor, width // factor), side_of((height, width), tile, factor)
    if side is None:
        return encode(images)
    codes, best = np.zeros((n, *grid), np.int32), np.zeros(grid, np.float32)
    for place in places(grid, side):
        tile_codes = encode(images[:, *in_pixels(place, factor)])
        weight = center_weights(tile_codes.shape[1:])
        codes[:, *place] = np.where(weight > best[place], tile_codes, codes[:, *place])
        best[place] = np.maximum(weight, best[place])
    return codes


def decoded(
    decode: Function, codes: np.ndarray, factor: int, channels: int, tile: int | None
) -> np.ndarray:
    """Images float32 [n,h*factor,w*factor,channels] of codes [n,h,w], by tiles of so many pixels a
    side (see `side_of`), which are blended where they overlap."""
    n, *grid = codes.shape
    size = [codes * factor for codes in grid]
    side = side_of(size, tile, factor)
    if side is None:
        return decode(codes)
    total, weights = np.zeros((n, *size, channels), np.float32), np.zeros(size, np.float32)
    for place in places(grid, side):
        tile_images, pixels = decode(codes[:, *place]), in_pixels(place, factor)
        weight = center_weights(tile_images.shape[1:3])
        total[:, *pixels] += tile_images * weight[..., None]
        weights[pixels] += weight
    return total / weights[..., None]
