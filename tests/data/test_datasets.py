import gzip
from importlib import resources

import numpy as np
import pytest

from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.errors import UserError

FILES = resources.files("taming_jax.data") / "mnist"


def test_mnist_has_the_known_sizes_and_statistics():
    train, validation, test, names = datasets.load(DataConfig())
    assert names == tuple("0123456789")
    assert (train.images.shape, validation.images.shape) == ((57000, 28, 28, 1), (3000, 28, 28, 1))
    assert test.images.shape == (10000, 28, 28, 1) and test.images.dtype == np.uint8
    images = np.concatenate([train.images, validation.images])
    assert abs(images.mean() - 33.318) < 1e-3 and abs(images.std() - 78.567) < 1e-3
    counts = np.bincount(np.concatenate([train.labels, validation.labels]))
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_the_validation_split_depends_on_the_seed_and_is_disjoint_from_training():
    split = datasets.Split(np.arange(100).reshape(100, 1, 1, 1), np.arange(100))

    def hold_out(**settings):
        return datasets.hold_out_validation(split, DataConfig(**settings))

    train, validation = hold_out(validation_share=0.2)
    assert sorted([*train.labels, *validation.labels]) == list(range(100))
    assert len(validation.labels) == 20 and (validation.images.ravel() == validation.labels).all()
    assert hold_out(validation_share=0.2)[1].labels.tolist() == validation.labels.tolist()
    other_validation = hold_out(validation_share=0.2, split_seed=1)[1]
    assert other_validation.labels.tolist() != validation.labels.tolist()
    for share in (0.0, 1.0):
        assert min(len(part.labels) for part in hold_out(validation_share=share)) == 1


def copy_files(folder, **replaced):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        content = (FILES / f"{name}-ubyte.gz").read_bytes()
        content = replaced.get(name.replace("-", "_"), content)
        if content is not None:
            (folder / f"{name}-ubyte.gz").write_bytes(content)


def encode_idx(shape, values=None, kind=8):
    header = bytes([0, 0, kind, len(shape)]) + np.array(shape, ">u4").tobytes()
    return header + (bytes(int(np.prod(shape))) if values is None else values)


def test_a_users_own_copy_is_read_compressed_or_not(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 40), ("t10k", 7)):
        pixels = rng.integers(0, 256, (n, 28, 28), np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(
            encode_idx(pixels.shape, pixels.tobytes())
        )
        labels = gzip.compress(encode_idx((n,), bytes(range(n % 10)) + bytes(n - n % 10)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(labels)
    splits = datasets.load(DataConfig(path=str(tmp_path)))
    assert [len(part.images) for part in splits[:3]] == [38, 2, 7]
    np.testing.assert_array_equal(splits.test.images[..., 0], pixels)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_labels_idx1": None}, "has no train-labels-idx1-ubyte.gz"),
        ({"t10k_images_idx3": b""}, "damaged|not an IDX"),
        (
            {"t10k_images_idx3": (FILES / "t10k-images-idx3-ubyte.gz").read_bytes()[:5000]},
            "damaged",
        ),
        ({"t10k_images_idx3": gzip.compress(encode_idx((9, 28, 28))[:-5])}, "is truncated"),
        ({"t10k_labels_idx1": gzip.compress(b"hello, world")}, "not an IDX file"),
        (
            {"t10k_labels_idx1": gzip.compress(encode_idx((9,)))},
            "10000 images of 28x28 and 9 labels",
        ),
    ],
)
def test_damaged_files_are_reported(tmp_path, replaced, message):
    copy_files(tmp_path, **replaced)
    with pytest.raises(UserError, match=message):
        datasets.load(DataConfig(path=str(tmp_path)))


def test_impossible_data_settings_are_refused(tmp_path):
    for settings, message in (
        ({"path": str(tmp_path / "none")}, "is not a folder"),
        ({"path": str(tmp_path)}, "has no train-images"),
        ({"image_size": 32}, "28x28"),
        ({"name": "cifar"}, f"the datasets are {', '.join(sorted(datasets.SOURCES))}, OWNER"),
    ):
        with pytest.raises(UserError, match=message):
            datasets.load(DataConfig(**settings))


def test_synthetic_images_have_any_size():
    splits = datasets.load(DataConfig(name="synthetic", image_size=20, channels=3))
    assert splits.train.images.shape[1:] == splits.test.images.shape[1:] == (20, 20, 3)
    assert set(splits.train.labels) == {0, 1, 2, 3} and splits.train.images.max() == 255
