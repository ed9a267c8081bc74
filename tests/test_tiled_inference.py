import itertools

import numpy as np
import pytest

from taming_jax import tiled_inference


@pytest.mark.parametrize(("size", "tile"), [(5, 8), (8, 8), (9, 8), (40, 8), (41, 16), (100, 12)])
def test_tiles_cover_an_axis_and_overlap(size, tile):
    starts = tiled_inference.compute_tile_starts(size, tile, tile // 4)
    assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
    for start, next_start in itertools.pairwise(starts):
        assert 0 < next_start - start <= tile - tile // 4


def test_encoding_in_tiles_equals_encoding_the_whole_image():
    """This holds for an encoder whose receptive field does not exceed the margin of a tile."""
    images = np.random.default_rng(0).random((2, 44, 70, 1)).astype(np.float32)

    def encode(images):
        codes = images.reshape(len(images), images.shape[1] // 2, 2, -1, 2).sum((2, 4))
        padded = np.pad(codes, ((0, 0), (1, 1), (1, 1)))  # a code depends on its neighbors
        return (1000 * (padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2])).astype(
            np.int32
        )

    np.testing.assert_array_equal(
        tiled_inference.encode_tiled(encode, images, 2, 16), encode(images)
    )
    np.testing.assert_array_equal(
        tiled_inference.encode_tiled(encode, images, 2, 128), encode(images)
    )


def test_decoded_tiles_are_blended():
    codes = np.random.default_rng(0).integers(0, 9, (2, 22, 35))
    shapes = []

    def decode(codes):
        shapes.append(codes.shape[1:])
        return np.repeat(np.repeat(codes, 2, 1), 2, 2)[..., None].astype(np.float32)

    expected = decode(codes)
    np.testing.assert_allclose(
        tiled_inference.decode_tiled(decode, codes, 2, 1, 16), expected, rtol=1e-6
    )
    assert set(shapes[1:]) == {(8, 8)}  # all tiles have the same shape, which is compiled once

    def decode_with_changing_shade(codes):  # differences between tiles are blended
        return decode(codes) * 0 + len(shapes) % 2

    decoded_row = tiled_inference.decode_tiled(
        decode_with_changing_shade, codes[:1, :8, :14], 2, 1, 16
    )[0, 4, :, 0]
    assert (
        np.abs(np.diff(decoded_row)).max() < 0.5
        and decoded_row.max() > 0.9
        and decoded_row.min() < 0.1
    )
