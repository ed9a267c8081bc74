import jax
import numpy as np
import pytest

from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.data.augment import augment, center_crop, diff_augment
from taming_jax.errors import UserError

BOTH = DataConfig(name="synthetic", image_size=16, channels=3, random_crop=True, mirror=True)
IMAGES = np.random.default_rng(0).integers(0, 256, (400, 18, 18, 3)).astype(np.uint8)
KEYS = jax.random.split(jax.random.key(0), 400)


def test_every_crop_and_both_ways_round_come_as_often():
    seen = {}
    out = np.asarray(augment(IMAGES, KEYS, BOTH))
    assert out.shape == (400, 16, 16, 3) and out.dtype == np.uint8
    for before, after in zip(IMAGES, out, strict=True):
        found = [
            (top, left, mirrored)
            for top in range(3) for left in range(3) for mirrored in (False, True)
            if (before[top : top + 16, left : left + 16][:, :: -1 if mirrored else 1]
                == after).all()
        ]  # fmt: skip
        assert len(found) == 1, "a crop of its own image"
        seen[found[0]] = seen.get(found[0], 0) + 1
    assert len(seen) == 18  # 22 of each expected
    assert min(seen.values()) > 8 and max(seen.values()) < 42


def test_an_image_is_changed_by_its_own_key_alone():
    together = augment(IMAGES, KEYS, BOTH)
    np.testing.assert_array_equal(augment(IMAGES[5:7], KEYS[5:7], BOTH), together[5:7])


def test_without_augmentation_nothing_changes():
    plain = DataConfig(image_size=18)
    assert augment(IMAGES, KEYS, plain) is IMAGES
    assert (center_crop(IMAGES, 18) == IMAGES).all()
    assert (center_crop(IMAGES, 16) == IMAGES[:, 1:17, 1:17]).all()


def test_only_training_images_are_larger():
    splits = datasets.load(BOTH)
    assert splits.train.images.shape[1:] == (18, 18, 3)
    assert splits.validation.images.shape[1:] == splits.test.images.shape[1:] == (16, 16, 3)
    with pytest.raises(UserError, match="leave --data.random-crop off"):
        datasets.load(DataConfig(random_crop=True))


def test_what_the_discriminator_sees_is_changed_as_it_says():
    images = np.random.default_rng(1).uniform(-1, 1, (64, 16, 16, 3)).astype(np.float32)
    keys = KEYS[:64]
    cut = np.asarray(diff_augment(images, keys, ["cutout"]))
    hidden = (cut == 0).all(-1)
    assert (cut[~hidden] == images[~hidden]).all()
    assert hidden.sum((1, 2)).max() == 64 and hidden.any((1, 2)).all()
    assert hidden.any(0).all(), "every place is hidden in some image"

    moved = np.asarray(diff_augment(images, keys, ["translation"]))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = [
        [(i, j) for i in range(5) for j in range(5) if (a == b[i : i + 16, j : j + 16]).all()]
        for a, b in zip(moved, padded, strict=True)
    ]
    assert all(len(found) == 1 for found in places) and len(set(map(tuple, places))) > 15

    colored = np.asarray(diff_augment(images, keys, ["color"]), np.float64)
    # Every step is linear in the pixels, so what is left of a difference of two pixels' grays is
    # the contrast, the same for all of an image.
    grays = colored.mean(-1).reshape(64, -1), images.mean(-1).reshape(64, -1).astype(float)
    contrast = (grays[0][:, :1] - grays[0][:, 1:]) / (grays[1][:, :1] - grays[1][:, 1:])
    np.testing.assert_allclose(contrast, np.median(contrast, 1)[:, None] + 0 * contrast, rtol=1e-2)
    assert 0.49 < contrast.min() < 0.7 and 1.3 < np.median(contrast, 1).max() < 1.51
    assert diff_augment(images, keys, []) is images


def published_cutout(height, width, row, column):
    """The mask of DiffAugment's public code, which clamps a window's places to the image."""
    hidden = np.zeros((height, width), bool)
    sizes = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    rows = np.clip(np.arange(sizes[0]) + row - sizes[0] // 2, 0, height - 1)
    columns = np.clip(np.arange(sizes[1]) + column - sizes[1] // 2, 0, width - 1)
    hidden[np.ix_(rows, columns)] = True
    return hidden


def test_cutout_hides_the_window_of_the_published_code():
    """Half of the height and half of the width, with the centre at any of its places."""
    images = np.ones((256, 6, 5, 1), np.float32)
    keys = jax.random.split(jax.random.key(2), len(images))
    hidden = np.asarray(diff_augment(images, keys, ["cutout"]))[..., 0] == 0
    # Both sizes are 3, which is odd, so that centres go from 0 to the last row and column.
    masks = {published_cutout(6, 5, i, j).tobytes() for i in range(6) for j in range(5)}
    assert {mask.tobytes() for mask in hidden} == masks
    even = np.ones((256, 4, 4, 1), np.float32)
    hidden = np.asarray(diff_augment(even, keys, ["cutout"]))[..., 0] == 0
    masks = {published_cutout(4, 4, i, j).tobytes() for i in range(5) for j in range(5)}
    assert {mask.tobytes() for mask in hidden} == masks
