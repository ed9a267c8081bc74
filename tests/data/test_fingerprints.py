import json

import numpy as np

from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.data.fingerprints import compute_fingerprint, diff_fingerprints, hash_splits


def test_a_fingerprint_recognizes_a_dataset_and_describes_differences():
    splits = datasets.load(DataConfig(name="synthetic", image_size=16))
    stored = json.loads(json.dumps(compute_fingerprint(splits)))
    images = splits.train.images.copy()
    images[0, 0, 0] ^= 1
    changed = splits._replace(train=splits.train._replace(images=images))
    assert diff_fingerprints(compute_fingerprint(changed), stored) == []
    hashes, changed_hashes = hash_splits(splits), hash_splits(changed)
    assert changed_hashes["training"] != hashes["training"]
    assert changed_hashes["validation"] == hashes["validation"]
    assert diff_fingerprints(compute_fingerprint(splits), stored) == []

    def describe_differences(**parts):
        return diff_fingerprints(compute_fingerprint(splits._replace(**parts)), stored)

    train = splits.train
    noise = np.random.default_rng(0).integers(-1, 2, train.images.shape)
    nearly_equal = np.clip(train.images + noise, 0, 255)  # another decoder may round differently
    assert describe_differences(train=train._replace(images=nearly_equal.astype(np.uint8))) == []
    assert describe_differences(train=train._replace(images=255 - train.images)) == [
        "the training images are different"
    ]
    fewer = datasets.Split(train.images[1:], train.labels[1:])
    assert describe_differences(train=fewer) == [
        f"there are {len(fewer.images)} training images, not {len(train.images)}"
    ]
    assert describe_differences(class_names=("a", "b")) == ["there are 2 classes, not 4"]
    assert describe_differences(class_names=("disc", "square", "ring", "x")) == [
        "a class is called 'ring', not 'large disc'"
    ]
