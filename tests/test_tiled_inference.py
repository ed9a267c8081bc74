import itertools

import numpy as np
import pytest

from taming_jax import tiled_inference


@pytest.mark.parametrize(("size", "tile"), [(5, 8), (8, 8), (9, 8), (40, 8), (41, 16), (100, 12)])
def test_tiles_cover_an_axis_and_overlap(size, tile):
    found = tiled_inference.compute_tile_starts(size, tile, tile // 4)
    assert found[0] == 0 and found[-1] == max(size - tile, 0)
    for one, next_one in itertools.pairwise(found):
        assert 0 < next_one - one <= tile - tile // 4


def test_codes_of_a_function_of_few_pixels_are_those_of_the_whole():
    """What looks no further than a tile's margin is the same in tiles."""
    images = np.random.default_rng(0).random((2, 44, 70, 1)).astype(np.float32)

    def encode(images):
        codes = images.reshape(len(images), images.shape[1] // 2, 2, -1, 2).sum((2, 4))
        padded = np.pad(codes, ((0, 0), (1, 1), (1, 1)))  # a code sees its neighbours
        return (1000 * (padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2])).astype(
            np.int32
        )

    np.testing.assert_array_equal(
        tiled_inference.encode_tiled(encode, images, 2, 16), encode(images)
    )
    np.testing.assert_array_equal(
        tiled_inference.encode_tiled(encode, images, 2, 128), encode(images)
    )


def test_decoded_tiles_run_into_one_another():
    codes = np.random.default_rng(0).integers(0, 9, (2, 22, 35))
    seen = []

    def decode(codes):
        seen.append(codes.shape[1:])
        return np.repeat(np.repeat(codes, 2, 1), 2, 2)[..., None].astype(np.float32)

    whole = decode(codes)
    np.testing.assert_allclose(
        tiled_inference.decode_tiled(decode, codes, 2, 1, 16), whole, rtol=1e-6
    )
    assert set(seen[1:]) == {(8, 8)}  # of one shape, which is compiled once

    def shaded(codes):  # what tiles disagree on changes slowly from one to the next
        return decode(codes) * 0 + len(seen) % 2

    row = tiled_inference.decode_tiled(shaded, codes[:1, :8, :14], 2, 1, 16)[0, 4, :, 0]
    assert np.abs(np.diff(row)).max() < 0.5 and row.max() > 0.9 and row.min() < 0.1
