"""Tests which files of a folder are read, as which split and class, and what messages say about
the others."""

import os

import pytest

from taming_jax.data import folders
from taming_jax.data.folders import find_images
from taming_jax.errors import UserError


def write(root, *paths):
    """Writes a different file to each path, in `root`."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def read(root, layout="auto", label_column=None):
    """Returns the images and classes of each split: {"train": {"1.png": "cats"}}."""
    splits = find_images(root, layout, label_column)
    return {
        split: dict(zip((file.name for file in files), classes or [None] * len(files), strict=True))
        for split, (files, classes) in splits.items()
    }


PETS = ("cats/1.png", "cats/2.png", "dogs/3.png")
CLASSES = {"1.png": "cats", "2.png": "cats", "3.png": "dogs"}


def test_a_link_to_a_parent_is_not_followed(tmp_path, capsys):
    root = write(tmp_path / "pets", *PETS)
    (root / "cats" / "all").symlink_to("..")
    (root / "dogs" / "all").symlink_to("..")
    (root / "dogs" / "self").symlink_to("self")
    assert read(root) == {"train": CLASSES}
    out = capsys.readouterr().out
    assert "links to folders (2, such as cats/all)" in out
    assert "broken links and special files (1, such as dogs/self)" in out


def test_links_out_of_the_folder_are_followed_once(tmp_path, capsys):
    root = write(tmp_path / "pets", *PETS)
    write(tmp_path / "more", "4.png")
    (root / "birds").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(root)
    (tmp_path / "more" / "away").symlink_to("/")
    assert read(root) == {"train": CLASSES | {"4.png": "birds"}}
    assert "links to folders (2, such as birds/away)" in capsys.readouterr().out


def test_a_file_with_several_names_counts_once(tmp_path, capsys):
    root = write(tmp_path / "pets", *PETS)
    (root / "dogs" / "4.png").symlink_to(root / "cats" / "1.png")
    os.link(root / "cats" / "1.png", root / "dogs" / "5.png")
    assert read(root) == {"train": CLASSES}
    assert (
        "other names of pictures already counted (2, such as dogs/4.png)" in capsys.readouterr().out
    )


def test_splits_made_of_links_are_read(tmp_path):
    root = write(tmp_path / "pets", *(f"all/{path}" for path in PETS))
    for split in ("train", "test"):
        (root / split).mkdir()
    (root / "train" / "cats").symlink_to(root / "all" / "cats")
    (root / "test" / "dogs").symlink_to(root / "all" / "dogs")
    cats = {"1.png": "cats", "2.png": "cats"}
    assert read(root) == {"train": cats, "test": {"3.png": "dogs"}}


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAINING", "validation", "testing"),
        ("training_set", "val-images", "Test Data"),
    ],
)
def test_folders_named_after_splits(tmp_path, capsys, train, validation, test):
    root = write(tmp_path, *(f"{train}/{path}" for path in PETS))
    write(root, f"{validation}/cats/4.png", f"{test}/dogs/5.png")
    assert read(root) == {
        "train": CLASSES, "validation": {"4.png": "cats"}, "test": {"5.png": "dogs"},
    }  # fmt: skip
    assert capsys.readouterr().out == ""


def test_classes_named_like_splits(tmp_path, capsys):
    root = write(tmp_path, "train/1.png", "bus/2.png", "car/3.png")
    classes = {"train": {"1.png": "train", "2.png": "bus", "3.png": "car"}}
    assert read(root) == classes
    out = capsys.readouterr().out
    assert f"These folders in {root} are read as classes: train; --data.layout splits reads" in out
    assert read(root, "splits") == {"train": {"1.png": None}}
    assert "bus" in capsys.readouterr().out
    assert read(root, "classes") == classes
    assert capsys.readouterr().out == ""


def test_other_folders_beside_splits(tmp_path, capsys):
    root = write(tmp_path, *(f"train/{path}" for path in PETS), "masks/9.png", "notes.txt")
    assert read(root) == {"train": CLASSES}
    out = capsys.readouterr().out
    assert f"Splits in {root}: train. Left out: masks; --data.layout classes reads all" in out
    assert "files and folders outside those that are read (2, such as masks)" in out
    assert read(root, "classes")["train"]["9.png"] == "masks"


def test_two_folders_of_one_split_are_refused(tmp_path):
    root = write(tmp_path, "train/1.png", "val/2.png", "valid/3.png")
    with pytest.raises(UserError, match="val and .*valid are both the validation split; rename"):
        read(root)


def test_the_folders_in_a_single_folder_are_read(tmp_path, capsys):
    root = write(tmp_path, *(f"raw-img/{path}" for path in PETS), "translate.py")
    assert read(root) == {"train": CLASSES}
    out = capsys.readouterr().out
    assert f"{root / 'raw-img'} is the only folder with pictures in {root}, so the" in out
    assert "files and folders outside those that are read (1, such as translate.py)" in out
    assert set(read(root, "classes")["train"].values()) == {"raw-img"}
    only_class = write(tmp_path / "one", "cats/1.png", "cats/2.png")
    assert read(only_class)["train"] == {"1.png": "cats", "2.png": "cats"}
    splits = write(tmp_path / "two", "pets/train/cats/1.png", "pets/test/cats/2.png")
    assert read(splits) == {"train": {"1.png": "cats"}, "test": {"2.png": "cats"}}


def test_every_file_is_accounted_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folders, "SUFFIXES", {".png", ".tif", ".heic"})
    root = write(tmp_path, *PETS, "cats/4.TIF", "fish/5.heic", "fish/6.HEIC")
    write(root, "cats/notes.txt", "README", ".DS_Store", "loose.png")
    assert read(root) == {"train": CLASSES | {"4.TIF": "cats"}}
    output = capsys.readouterr().out
    for reason in (
        "files of type .heic, which Pillow cannot open (2, such as fish/5.heic)",
        "files of type .txt (1, such as cats/notes.txt)",
        "files without a suffix (1, such as README)",
        "hidden files and folders (1, such as .DS_Store)",
        "pictures outside the class folders (1, such as loose.png)",
    ):
        assert reason in output


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,species\n./1.png,cat\n2.png,dog\nsub/3.png,dog\n4.png,cat\n"),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "tags": ["x"]}\n{"file_name": "2.png", "species": "dog"}\n'
            '{"file_name": "sub/3.png", "species": "dog"}\n\n'
            '{"file_name": "4.png", "species": "cat"}\n{"file_name": "1.png", "species": "cat"}\n',
        ),
    ],
)
def test_a_table_beside_the_pictures_names_their_classes(tmp_path, capsys, name, text):
    root = write(tmp_path, "1.png", "2.png", "sub/3.png")
    (root / name).write_text(text)
    expected = {"1.png": "cat", "2.png": "dog", "3.png": "dog"}
    assert read(root, label_column="species") == {"train": expected}
    out = capsys.readouterr().out
    assert "classes from 'species'" in out and "Left out" not in out
    assert "pictures without a row: 0; rows without a picture: 1." in out
    write(root, "other/5.png")
    assert read(root) == {"train": {"3.png": "sub", "5.png": "other"}}
    assert f"such as {name})" in capsys.readouterr().out


def test_a_column_of_classes_without_a_table_is_refused(tmp_path):
    root = write(tmp_path, *PETS)
    with pytest.raises(UserError, match=r"no metadata.csv or .* for --data.label-column species"):
        read(root, label_column="species")


def test_folders_within_splits_and_links_between_splits(tmp_path, capsys):
    root = write(tmp_path, "training_set/training_set/cats/1.png", "training_set/x.txt")
    write(root, "training_set/training_set/dogs/2.png", "test_set/test_set/cats/3.png")
    write(root, "__MACOSX/training_set/4.png")
    os.link(
        root / "training_set" / "training_set" / "cats" / "1.png",
        root / "test_set" / "test_set" / "cats" / "9.png",
    )
    (root / "valid").symlink_to(root / "test_set" / "test_set")
    classes = {"1.png": "cats", "2.png": "dogs"}
    assert read(root) == {"train": classes, "test": {"3.png": "cats"}}
    assert "other names of pictures already counted (3, such as test_set" in capsys.readouterr().out


def test_a_damaged_table_is_reported(tmp_path):
    root = write(tmp_path, "1.png", "metadata.jsonl")
    with pytest.raises(UserError, match="is not a table with a column 'file_name'"):
        read(root)


def test_a_folder_without_pictures_is_refused_and_its_files_are_counted(tmp_path, capsys):
    root = write(tmp_path, "cats/1.heic", "cats/2.heic", "notes.txt")
    with pytest.raises(UserError, match="holds no pictures .* and no parquet files; put some"):
        read(root)
    assert (
        "files of type .heic, which Pillow cannot open (2, such as cats/1.heic)"
        in capsys.readouterr().out
    )


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    root = write(tmp_path, f"{name}/1.png", "cats/2.png")
    assert set(read(root)["train"].values()) == {"caf\\xe9", "cats"}
