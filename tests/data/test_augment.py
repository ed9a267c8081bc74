import jax
import numpy as np
import pytest

from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.data.augment import augment, center_crop, diff_augment
from taming_jax.errors import UserError

CROP_AND_MIRROR = DataConfig(
    name="synthetic", image_size=16, channels=3, random_crop=True, mirror=True
)
IMAGES = np.random.default_rng(0).integers(0, 256, (400, 18, 18, 3)).astype(np.uint8)
KEYS = jax.random.split(jax.random.key(0), 400)


def test_crops_and_mirror_images_are_equally_frequent():
    counts = {}
    out = np.asarray(augment(IMAGES, KEYS, CROP_AND_MIRROR))
    assert out.shape == (400, 16, 16, 3) and out.dtype == np.uint8
    for before, after in zip(IMAGES, out, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(3) for left in range(3) for mirrored in (False, True)
            if (before[top : top + 16, left : left + 16][:, :: -1 if mirrored else 1]
                == after).all()
        ]  # fmt: skip
        assert len(matches) == 1, "the result is one crop of its own image"
        counts[matches[0]] = counts.get(matches[0], 0) + 1
    assert len(counts) == 18  # about 22 of each are expected
    assert min(counts.values()) > 8 and max(counts.values()) < 42


def test_the_augmentation_of_an_image_depends_only_on_its_own_key():
    together = augment(IMAGES, KEYS, CROP_AND_MIRROR)
    np.testing.assert_array_equal(augment(IMAGES[5:7], KEYS[5:7], CROP_AND_MIRROR), together[5:7])


def test_without_augmentation_images_do_not_change():
    plain = DataConfig(image_size=18)
    assert augment(IMAGES, KEYS, plain) is IMAGES
    assert (center_crop(IMAGES, 18) == IMAGES).all()
    assert (center_crop(IMAGES, 16) == IMAGES[:, 1:17, 1:17]).all()


def test_random_crop_loads_larger_training_images_only():
    splits = datasets.load(CROP_AND_MIRROR)
    assert splits.train.images.shape[1:] == (18, 18, 3)
    assert splits.validation.images.shape[1:] == splits.test.images.shape[1:] == (16, 16, 3)
    with pytest.raises(UserError, match="leave --data.random-crop off"):
        datasets.load(DataConfig(random_crop=True))


def test_diff_augment_applies_cutout_translation_and_color():
    images = np.random.default_rng(1).uniform(-1, 1, (64, 16, 16, 3)).astype(np.float32)
    keys = KEYS[:64]
    cut = np.asarray(diff_augment(images, keys, ["cutout"]))
    hidden = (cut == 0).all(-1)
    assert (cut[~hidden] == images[~hidden]).all()
    assert hidden.sum((1, 2)).max() == 64 and hidden.any((1, 2)).all()
    assert hidden.any(0).all(), "every pixel is hidden in some image"

    moved = np.asarray(diff_augment(images, keys, ["translation"]))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    offset_lists = [
        [(i, j) for i in range(5) for j in range(5) if (a == b[i : i + 16, j : j + 16]).all()]
        for a, b in zip(moved, padded, strict=True)
    ]
    assert all(len(offsets) == 1 for offsets in offset_lists)
    assert len(set(map(tuple, offset_lists))) > 15

    colored = np.asarray(diff_augment(images, keys, ["color"]), np.float64)
    # Every step is linear in the pixels. Therefore, the difference between the grays of two pixels
    # changes by the contrast only, which is the same for the whole image.
    grays = colored.mean(-1).reshape(64, -1), images.mean(-1).reshape(64, -1).astype(float)
    contrast = (grays[0][:, :1] - grays[0][:, 1:]) / (grays[1][:, :1] - grays[1][:, 1:])
    np.testing.assert_allclose(contrast, np.median(contrast, 1)[:, None] + 0 * contrast, rtol=1e-2)
    assert 0.49 < contrast.min() < 0.7 and 1.3 < np.median(contrast, 1).max() < 1.51
    assert diff_augment(images, keys, []) is images


def compute_published_cutout(height, width, row, column):
    """Returns the mask of DiffAugment's public code, which clamps the coordinates of a window to
    the image."""
    hidden = np.zeros((height, width), bool)
    sizes = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    rows = np.clip(np.arange(sizes[0]) + row - sizes[0] // 2, 0, height - 1)
    columns = np.clip(np.arange(sizes[1]) + column - sizes[1] // 2, 0, width - 1)
    hidden[np.ix_(rows, columns)] = True
    return hidden


def test_cutout_hides_the_window_of_the_published_code():
    """The window has half of the height and half of the width. Its center is random."""
    images = np.ones((256, 6, 5, 1), np.float32)
    keys = jax.random.split(jax.random.key(2), len(images))
    hidden = np.asarray(diff_augment(images, keys, ["cutout"]))[..., 0] == 0
    # Both sizes are 3, which is odd, so that centers range from 0 to the last row and column.
    masks = {compute_published_cutout(6, 5, i, j).tobytes() for i in range(6) for j in range(5)}
    assert {mask.tobytes() for mask in hidden} == masks
    even = np.ones((256, 4, 4, 1), np.float32)
    hidden = np.asarray(diff_augment(even, keys, ["cutout"]))[..., 0] == 0
    masks = {compute_published_cutout(4, 4, i, j).tobytes() for i in range(5) for j in range(5)}
    assert {mask.tobytes() for mask in hidden} == masks
