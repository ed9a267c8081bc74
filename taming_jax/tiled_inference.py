"""Encoding and decoding in overlapping tiles, for images that are too large for memory.

Normalization and attention extend over the whole input of a network, so the codes of a tile are
close to those of the full image, but not identical.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from taming_jax.errors import UserError
from taming_jax.models.vqgan import MAX_PIXELS

Function = Callable[[np.ndarray], np.ndarray]
Tile = tuple[slice, slice]  # the rows and the columns


def choose_tile_side(size: Sequence[int], tile: int | None, factor: int) -> int | None:
    """Returns the side of a tile in codes, or None if images of this height and width in pixels
    are small enough to need no tiles. `tile` is the side in pixels, or None for the default. Raises
    UserError if `tile` is invalid."""
    is_integer = tile is None or isinstance(tile, int | np.integer)
    if tile is not None and (not is_integer or tile < 4 * factor or tile % factor):
        raise UserError(
            f"the tile is {tile} pixels; it must be a multiple of {factor}, at least {4 * factor}."
        )
    if tile is None and size[0] * size[1] <= MAX_PIXELS:
        return None
    return (tile or math.isqrt(MAX_PIXELS)) // factor


def compute_tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Returns the starts of tiles that cover an axis and overlap by at least `overlap`."""
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def iterate_tiles(shape: Sequence[int], tile: int) -> Iterator[Tile]:
    """Yields the tiles of a grid; adjacent tiles overlap by at least a quarter of their side."""
    rows, columns = (compute_tile_starts(size, tile, tile // 4) for size in shape)
    for row in rows:
        for column in columns:
            yield slice(row, row + tile), slice(column, column + tile)


def to_pixels(tile: Tile, factor: int) -> Tile:
    """Converts a tile from units of codes to units of pixels."""
    rows, columns = (slice(axis.start * factor, axis.stop * factor) for axis in tile)
    return rows, columns


def make_center_weights(shape: Sequence[int]) -> np.ndarray:
    """Returns weights float32 [h,w] for a tile, which grow from its edges to its center."""
    ramps = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in shape)
    return np.multiply.outer(*ramps).astype(np.float32)


def encode_tiled(encode: Function, images: np.ndarray, factor: int, tile: int | None) -> np.ndarray:
    """Encodes images [n,h,w,c] into codes int32 [n,h/factor,w/factor], in tiles of `tile` pixels
    per side (see `choose_tile_side`). Each code comes from the tile whose center is closest."""
    n, height, width = images.shape[:3]
    grid = (height // factor, width // factor)
    side = choose_tile_side((height, width), tile, factor)
    if side is None:
        return encode(images)
    codes, best = np.zeros((n, *grid), np.int32), np.zeros(grid, np.float32)
    for area in iterate_tiles(grid, side):
        tile_codes = encode(images[:, *to_pixels(area, factor)])
        weights = make_center_weights(tile_codes.shape[1:])
        codes[:, *area] = np.where(weights > best[area], tile_codes, codes[:, *area])
        best[area] = np.maximum(weights, best[area])
    return codes


def decode_tiled(
    decode: Function, codes: np.ndarray, factor: int, channels: int, tile: int | None
) -> np.ndarray:
    """Decodes codes [n,h,w] into images float32 [n,h*factor,w*factor,channels], in tiles of `tile`
    pixels per side (see `choose_tile_side`), which are blended where they overlap."""
    n, *grid = codes.shape
    size = [length * factor for length in grid]
    side = choose_tile_side(size, tile, factor)
    if side is None:
        return decode(codes)
    total, total_weights = np.zeros((n, *size, channels), np.float32), np.zeros(size, np.float32)
    for area in iterate_tiles(grid, side):
        images, pixels = decode(codes[:, *area]), to_pixels(area, factor)
        weights = make_center_weights(images.shape[1:3])
        total[:, *pixels] += images * weights[..., None]
        total_weights[pixels] += weights
    return total / total_weights[..., None]
