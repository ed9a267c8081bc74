"""Tests of all kinds of sources of pictures, and of sources that cannot be read."""

import os
import shutil

import numpy as np
import pytest

from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.data.fingerprints import compute_fingerprint
from taming_jax.errors import UserError
from tests.data import pictures


def make_config(tmp_path, name, path, **settings):
    return DataConfig(
        name=name, path=None if path is None else str(path), image_size=16, channels=3,
        cache=str(tmp_path / "cache"), **settings,
    )  # fmt: skip


def test_every_kind_of_source_gives_the_same_splits(tmp_path):
    folder = pictures.write_folder(tmp_path / "my pictures ü")
    parquet = pictures.write_parquet(tmp_path / "parquet")
    tfds = pictures.write_tfds(tmp_path / "tfds")
    configs = {
        "folder": make_config(tmp_path, "folder", folder),
        "parquet": make_config(tmp_path, "someone/pictures", parquet),
        "hub": make_config(tmp_path, str(parquet), None),
        "tfds": make_config(tmp_path, "tfds:toy", tmp_path / "tfds"),
        "tfds directory": make_config(tmp_path, "tfds:toy", tfds),
    }
    expected = datasets.load(configs["folder"])
    assert expected.class_names == pictures.NAMES
    assert [len(part.images) for part in expected[:3]] == [42, 9, 9]
    assert expected.train.labels.tolist() == pictures.SPLITS["train"][1]
    for kind, config in configs.items():
        splits = datasets.load(config)
        assert splits.class_names == expected.class_names, kind
        for part, other in zip(splits[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(part.images, other.images, err_msg=kind)
            np.testing.assert_array_equal(part.labels, other.labels, err_msg=kind)


def test_each_image_column_has_its_own_cache(tmp_path):
    import pyarrow
    import pyarrow.parquet as pq

    (tmp_path / "two").mkdir()
    contents, _ = pictures.make_split(12)
    table = pyarrow.table({"image": contents, "mask": contents[::-1]})
    pq.write_table(table, tmp_path / "two" / "train.parquet")
    first, second = (
        datasets.load(make_config(tmp_path, "a/b", tmp_path / "two", image_column=column))
        for column in ("image", "mask")
    )
    assert (first.train.images != second.train.images).any()


def test_a_replaced_parquet_file_is_read_again(tmp_path):
    """This holds even if its name, size, and modification time are the same, as after rsync."""
    root = pictures.write_parquet(tmp_path / "parquet")
    first = datasets.load(make_config(tmp_path, "a/b", root)).train.images[0].copy()
    file = next(root.glob("train*"))
    times = file.stat()
    content, labels = pictures.SPLITS["train"]
    other = {"train": (content[::-1], labels)}
    pictures.write_parquet(tmp_path / "other", other)
    file.write_bytes(next((tmp_path / "other").glob("train*")).read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = datasets.load(make_config(tmp_path, "a/b", root)).train.images[0]
    assert (first != second).any()


def test_hidden_folders_are_not_classes(tmp_path):
    contents, _ = pictures.make_split(10)
    (tmp_path / "flat" / ".thumbs").mkdir(parents=True)
    for i, content in enumerate(contents):
        (tmp_path / "flat" / f"{i}.jpg").write_bytes(content)
        (tmp_path / "flat" / ".thumbs" / f"{i}.jpg").write_bytes(content)
    splits = datasets.load(make_config(tmp_path, "folder", tmp_path / "flat"))
    assert splits.class_names == ("all",) and sum(len(p.images) for p in splits[:3]) == 10


def test_folders_without_classes_or_without_splits_are_read(tmp_path):
    contents, _ = pictures.make_split(20)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, content in enumerate(contents):
        (flat / f"{i}.JPEG").write_bytes(content)
    (flat / "notes.txt").write_text("not a picture")
    splits = datasets.load(make_config(tmp_path, "folder", flat))
    assert splits.class_names == ("all",) and sum(len(p.images) for p in splits[:3]) == 20
    again = datasets.load(make_config(tmp_path, "folder", flat))
    np.testing.assert_array_equal(splits.test.images, again.test.images)
    other = datasets.load(make_config(tmp_path, "folder", flat, split_seed=1))
    assert (splits.test.images != other.test.images).any()

    train_only = pictures.write_folder(tmp_path / "a", {"train": pictures.make_split(30)})
    classes = shutil.copytree(train_only / "train", tmp_path / "b")
    first, second = (
        datasets.load(make_config(tmp_path, "folder", root)) for root in (train_only, classes)
    )
    assert first.class_names == second.class_names == pictures.NAMES
    np.testing.assert_array_equal(first.train.images, second.train.images)


def test_pictures_outside_the_class_and_split_folders_are_reported(tmp_path, capsys):
    root = pictures.write_folder(tmp_path / "a")
    datasets.load(make_config(tmp_path, "folder", root))
    assert "left out" not in capsys.readouterr().out
    shutil.copytree(root / "train", root / "more")
    datasets.load(make_config(tmp_path, "folder", root))
    output = capsys.readouterr().out
    assert (
        f"Left out of {root}: files and folders outside those that are read (1, such as more)."
        in output
    )
    shutil.copy(next((root / "more").rglob("*.jpg")), root / "more" / "loose.jpg")
    datasets.load(make_config(tmp_path, "folder", root / "more"))
    output = capsys.readouterr().out
    assert (
        f"Left out of {root / 'more'}: pictures outside the class folders (1, such as loose.jpg)."
        in output
    )


def test_classes_that_only_the_test_split_has_give_a_warning(tmp_path, capsys):
    parts = {"train": pictures.make_split(9), "test": pictures.make_split(9)}
    root = pictures.write_folder(tmp_path / "x", parts)
    shutil.rmtree(root / "train" / pictures.NAMES[0])
    splits = datasets.load(make_config(tmp_path, "folder", tmp_path / "x"))
    assert splits.class_names == (*pictures.NAMES[1:], pictures.NAMES[0])
    assert (
        "Warning: there are no training pictures for 1 of 3 classes: a dog."
        in capsys.readouterr().out
    )


def test_parquet_files_without_the_hubs_metadata_are_read(tmp_path):
    contents, labels = pictures.make_split(12)
    parts = {"train": (contents, labels)}
    root = pictures.write_parquet(tmp_path / "numbers", parts, metadata=False)
    assert datasets.load(make_config(tmp_path, "a/b", root)).class_names == ("0", "1", "2")
    named = (contents, [pictures.NAMES[label] for label in labels])
    root = pictures.write_parquet(tmp_path / "n", {"train": named}, "kind", metadata=False)
    splits = datasets.load(make_config(tmp_path, "a/b", root, label_column="kind"))
    assert splits.class_names == pictures.NAMES
    assert datasets.load(make_config(tmp_path, "a/b", root)).class_names == pictures.NAMES


def make_labels_split(values):
    contents, _ = pictures.make_split(len(values))
    return {"train": (contents, values)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, None], "have no class"),
        ([0, 1, -1], "go from -1 to 1; number them from 0"),
        ([0, 1, 3], "go from 0 to 3; number them from 0 to at most 2"),
        ([0.5, 1.0, 2.0], "of type float"),
        ([[0], [1], [2]], "of type list"),
    ],
)
def test_invalid_labels_are_refused(tmp_path, values, message):
    root = pictures.write_parquet(tmp_path / "data", make_labels_split(values))
    with pytest.raises(UserError, match=message):
        datasets.load(make_config(tmp_path, "a/b", root))


def test_unreadable_sources_are_refused(tmp_path):
    empty, one, parquet = (tmp_path / name for name in ("empty", "one", "parquet"))
    empty.mkdir()
    one.mkdir()
    (one / "a.jpg").write_bytes(pictures.make_split(1)[0][0])
    pictures.write_parquet(parquet)
    broken = shutil.copytree(parquet, tmp_path / "broken")
    file = broken / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    for config, message in (
        (make_config(tmp_path, "folder", None), "--data.name folder needs --data.path"),
        (make_config(tmp_path, "folder", tmp_path / "no"), "is not a folder"),
        (make_config(tmp_path, "folder", empty), "holds no pictures"),
        (make_config(tmp_path, "folder", one), "has too few training pictures"),
        (make_config(tmp_path, "a/b", empty), "holds no pictures .* and no parquet files"),
        (make_config(tmp_path, "a/b", broken), "cannot be read .* download them again"),
        (
            make_config(tmp_path, "a/b", parquet, image_column="img"),
            "no column 'img' .* one of these: image.",
        ),
        (
            make_config(tmp_path, "a/b", parquet, label_column="kind"),
            "no column 'kind'; set --data.label-column to one of these: image, label",
        ),
        (
            make_config(tmp_path, "a/b", parquet, image_column="label"),
            "no column 'label' that holds images; .* one of these: image.",
        ),
        (make_config(tmp_path, "tfds:cifar10", tmp_path), "tfds build cifar10"),
        (make_config(tmp_path, "tfds:nothing", tmp_path), "tfds build nothing"),
        (make_config(tmp_path, "cifar", None), "--data.name cifar is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            datasets.load(config)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read all files")
def test_files_without_read_permission_are_reported(tmp_path):
    root = pictures.write_folder(tmp_path / "data")
    next(root.rglob("*.jpg")).chmod(0)
    with pytest.raises(UserError, match="check its permissions"):
        datasets.load(make_config(tmp_path, "folder", root))


def test_the_hub_without_a_network_is_reported(tmp_path, monkeypatch):
    import datasets as hub

    def raise_connection_error(name, config):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "load_dataset", raise_connection_error)
    with pytest.raises(UserError, match="download its parquet files elsewhere .* --data.path"):
        datasets.load(make_config(tmp_path, "someone/pictures", None))


@pytest.mark.parametrize(
    "file",
    [
        "{}.parquet",
        "{}-00000-of-00001.parquet",
        "data/{}-00000.parquet",
        "data/{}/a.b.parquet",
        "{}/0000.parquet",
        "default/{}/0000.parquet",
        "default/partial-{}/0.parquet",
        "plain_text/{}-00000-of-00001.parquet",
    ],
)
def test_layouts_of_parquet_files(tmp_path, file):
    source = pictures.write_parquet(tmp_path / "source")
    for split in pictures.SPLITS:
        target = tmp_path / "data set" / file.format(split)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"{split}-00000-of-00001.parquet", target)
    for name in ("a/b", "folder"):
        splits = datasets.load(make_config(tmp_path, name, tmp_path / "data set"))
        assert [len(part.images) for part in splits[:3]] == [42, 9, 9]
        assert splits.class_names == pictures.NAMES


def test_parquet_files_of_no_split_are_training_images(tmp_path):
    (tmp_path / "x").mkdir()
    source = pictures.write_parquet(tmp_path / "source")
    shutil.copy(source / "train-00000-of-00001.parquet", tmp_path / "x" / "data-00000.parquet")
    splits = datasets.load(make_config(tmp_path, "a/b", tmp_path / "x"))
    assert sum(len(part.images) for part in splits[:3]) == 42


def test_one_of_several_configurations(tmp_path):
    for name, parts in (("small", {"train": pictures.make_split(9)}), ("full", pictures.SPLITS)):
        pictures.write_parquet(tmp_path / "x" / name, parts)
    with pytest.raises(UserError, match="set --data.config .*: 'full', 'small'"):
        datasets.load(make_config(tmp_path, "a/b", tmp_path / "x"))
    splits = datasets.load(make_config(tmp_path, "a/b", tmp_path / "x", config="full"))
    assert len(splits.train.images) == 42


def test_a_saved_dataset_is_read(tmp_path):
    import datasets as hub

    parts = {}
    for split, (contents, labels) in pictures.SPLITS.items():
        images = [{"bytes": content, "path": None} for content in contents]
        kind = hub.ClassLabel(names=list(pictures.NAMES))
        features = hub.Features({"picture": hub.Image(), "kind": kind})
        parts[split] = hub.Dataset.from_dict({"picture": images, "kind": labels}, features)
    hub.DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    for name in ("folder", "a/b"):
        splits = datasets.load(make_config(tmp_path, name, tmp_path / "all"))
        assert [len(part.images) for part in splits[:3]] == [42, 9, 9]
        assert splits.class_names == pictures.NAMES
    splits = datasets.load(make_config(tmp_path, "folder", tmp_path / "one"))
    assert sum(len(part.images) for part in splits[:3]) == 42
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(UserError, match="saved dataset in .* cannot be read"):
        datasets.load(make_config(tmp_path, "folder", tmp_path / "one"))


@pytest.mark.parametrize("labels", [[-1] * 9, [None] * 9])
def test_a_test_split_without_labels_is_left_out(tmp_path, capsys, labels):
    parts = pictures.SPLITS | {"test": (pictures.SPLITS["test"][0], labels)}
    root = pictures.write_parquet(tmp_path / "x", parts)
    splits = datasets.load(make_config(tmp_path, "a/b", root))
    assert [len(part.images) for part in splits[:3]] == [38, 9, 4]
    assert "test: 9 pictures without a class are left out." in capsys.readouterr().out


def test_some_validation_images_without_labels_are_left_out(tmp_path):
    contents, labels = pictures.SPLITS["validation"]
    parts = pictures.SPLITS | {"validation": (contents, [*labels[:5], *[None] * 4])}
    root = pictures.write_parquet(tmp_path / "x", parts)
    splits = datasets.load(make_config(tmp_path, "a/b", root))
    assert splits.validation.labels.tolist() == labels[:5]


def test_a_flat_test_folder_is_left_out(tmp_path, capsys):
    root = pictures.write_folder(tmp_path / "x", {"train": pictures.SPLITS["train"]})
    (root / "test").mkdir()
    for i, content in enumerate(pictures.make_split(5)[0]):
        (root / "test" / f"{i}.jpg").write_bytes(content)
    splits = datasets.load(make_config(tmp_path, "folder", root))
    assert [len(part.images) for part in splits[:3]] == [36, 2, 4]
    assert "test: 5 pictures without a class are left out." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "label", "unused"),
    [
        ({"species": ["a", "b", "a", "b"], "sex": ["m", "m", "f", "f"]}, "species", "sex"),
        ({"id": ["1", "2", "3", "4"], "kind": ["a", "b", "a", "b"]}, "kind", "id"),
        ({"Class": [0, 1, 0, 1], "size": [3, 4, 5, 6]}, "Class", "size"),
        ({"one": ["a", "b", "a", "b"], "two": ["c", "d", "c", "d"]}, None, "one, two"),
        ({"text": ["a", "b", "c", "d"]}, None, "text"),
    ],
)
def test_the_column_of_classes_and_unused_columns_are_named(
    tmp_path, capsys, columns, label, unused
):
    import pyarrow
    import pyarrow.parquet as pq

    (tmp_path / "x").mkdir()
    table = pyarrow.table({"image": pictures.make_split(4)[0]} | columns)
    pq.write_table(table, tmp_path / "x" / "train.parquet")
    splits = datasets.load(make_config(tmp_path, "a/b", tmp_path / "x"))
    output = capsys.readouterr().out
    assert len(splits.class_names) == (2 if label else 1)
    assert (f"classes from '{label}'" if label else "no classes.") in output
    assert f"Unused columns: {unused}." in output
    assert ("--data.label-column" in output) == (label is None)


def test_class_numbers_that_do_not_occur_are_reported_as_untrained(tmp_path, capsys):
    contents, _ = pictures.make_split(12)
    root = pictures.write_parquet(
        tmp_path / "x", {"train": (contents, [1, 2, 5] * 4)}, metadata=False
    )
    splits = datasets.load(make_config(tmp_path, "a/b", root))
    assert "there are no training pictures for 3 of 6 classes: 0, 3, 4." in capsys.readouterr().out
    assert compute_fingerprint(splits)["untrained_classes"] == [0, 3, 4]


def test_names_of_configurations_in_files(tmp_path):
    source = pictures.write_parquet(tmp_path / "source")
    for config in ("cifar10", "cifar100"):
        for split in ("train", "test"):
            (tmp_path / "x").mkdir(exist_ok=True)
            file = source / f"{split}-00000-of-00001.parquet"
            shutil.copy(file, tmp_path / "x" / f"{config}-{split}.parquet")
    with pytest.raises(UserError, match="set --data.config .*: 'cifar10', 'cifar100'"):
        datasets.load(make_config(tmp_path, "a/b", tmp_path / "x"))
    splits = datasets.load(make_config(tmp_path, "a/b", tmp_path / "x", config="cifar10"))
    assert len(splits.test.images) == 9
    # A link to a file is the same file.
    link = tmp_path / "y" / "train-copy.parquet"
    link.parent.mkdir()
    file = shutil.copy(source / "train-00000-of-00001.parquet", link.parent / "train-0.parquet")
    link.symlink_to(file)
    splits = datasets.load(make_config(tmp_path, "a/b", link.parent))
    assert sum(len(part.images) for part in splits[:3]) == 42


def test_splits_whose_classes_have_another_order(tmp_path):
    import datasets as hub

    parts = {}
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        contents, _ = pictures.make_split(6)
        images = [{"bytes": content, "path": None} for content in contents]
        features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=names)})
        labels = [names.index("cat")] * 4 + [names.index("dog")] * 2
        parts[split] = hub.Dataset.from_dict({"image": images, "label": labels}, features)
        (tmp_path / "x" / split).mkdir(parents=True)
        parts[split].to_parquet(tmp_path / "x" / split / "0.parquet")
    splits = datasets.load(make_config(tmp_path, "a/b", tmp_path / "x", validation_share=0.2))
    assert splits.class_names == ("cat", "dog")
    assert splits.test.labels.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("unknown", ["?", "-1", "", None])
def test_named_classes_with_unknown_ones(tmp_path, unknown):
    contents, labels = pictures.make_split(12)
    parts = {
        "train": (contents, ["a" if label else "b" for label in labels]),
        "test": (contents[:4], ["a", unknown, "b", unknown]),
    }
    root = pictures.write_parquet(tmp_path / "x", parts, metadata=False)
    splits = datasets.load(make_config(tmp_path, "a/b", root))
    assert splits.class_names == ("a", "b") and splits.test.labels.tolist() == [0, 1]
