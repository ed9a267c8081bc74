import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets, images
from taming_jax.data.images import decode
from taming_jax.data.readers import Files
from taming_jax.errors import UserError
from tests import commands
from tests.data import pictures
from tests.data.pictures import encoded, picture


def test_the_middle_square_resized_with_antialiasing():
    image = picture(1, 90, 60)
    found = decode(encoded(image, "PNG"), 20, 3, resize_mode="crop")
    expected = image.resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    np.testing.assert_array_equal(found, np.asarray(expected))
    squeezed = decode(encoded(image, "PNG"), 20, 3, resize_mode="squeeze")
    expected = image.resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squeezed, np.asarray(expected))
    # Fine stripes become gray, not other stripes.
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (128, 64)))
    gray = decode(encoded(stripes, "PNG"), 13, 1, resize_mode="crop")
    assert gray.shape == (13, 13, 1) and abs(gray.astype(int) - 127).max() < 40


def test_a_picture_is_turned_as_exif_says():
    image = picture(2, 60, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    found = decode(encoded(image, "JPEG", exif=exif, quality=95), 60, 3, resize_mode="crop")
    expected = np.rot90(np.asarray(image), -1).astype(int)
    assert np.abs(found - expected).mean() < 8 < np.abs(found - np.asarray(image)).mean()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_and_mode(kind, mode):
    image = picture(3, 48, 48, mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(image, kind, **options), 48, 3, resize_mode="crop")
    reference = np.asarray(image.convert("RGB")).astype(int)
    assert found.shape == (48, 48, 3) and np.abs(found - reference).mean() < 12


def test_palettes_transparency_and_print_colours():
    image = picture(4, 32, 32)
    reference = np.asarray(image).astype(int)

    def error(content):
        return np.abs(decode(content, 32, 3, resize_mode="crop") - reference).mean()

    assert error(encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")) < 12
    assert error(encoded(image.convert("CMYK"), "JPEG", quality=95)) < 12
    clear = image.copy()
    clear.putalpha(0)
    assert (decode(encoded(clear, "PNG"), 32, 3, resize_mode="crop") == 255).all(), "clear is white"
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    gray = decode(encoded(deep, "PNG"), 32, 1, resize_mode="crop")
    assert np.abs(gray[..., 0].astype(int) - np.asarray(image.convert("L"))).max() <= 1


def test_a_long_thin_picture_costs_no_memory():
    found = decode(encoded(Image.new("RGB", (30_000, 3), "red"), "PNG"), 32, 3, resize_mode="crop")
    assert (found == [255, 0, 0]).all()


def test_bombs_are_refused():
    for bomb in (
        encoded(Image.new("L", (1000, 1000)), "PNG"),
        encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=True),
    ):
        with pytest.raises(ValueError, match="decoding takes . MiB; --data.max-decoded-mib allows"):
            decode(bomb, 32, 3, resize_mode="crop", max_mib=2)
    drafted = encoded(Image.new("L", (1000, 1000), 200), "JPEG")  # decoded at an eighth
    assert (decode(drafted, 32, 3, resize_mode="crop", max_mib=1) == 200).all()


def test_large_pictures_and_texts_are_read(tmp_path, recwarn):
    """Pillow alone refuses the first two, and warns about the third."""
    large = encoded(Image.new("L", (18_000, 10_100), 50), "JPEG")
    info = PngInfo()
    info.add_text("note", "x" * 2**21, zip=True)
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\x09" + b"\x01\x12\0\x03\xff\xff\xff\xff"
    contents = {
        "large.jpg": large,
        "text.png": encoded(Image.new("L", (40, 40), 50), "PNG", pnginfo=info),
        "profile.png": encoded(Image.new("L", (40, 40), 50), "PNG", icc_profile=bytes(3 * 2**20)),
        "exif.jpg": encoded(Image.new("L", (40, 40), 50), "JPEG", exif=exif),
    }
    (tmp_path / "data").mkdir()
    for name, content in contents.items():
        (tmp_path / "data" / name).write_bytes(content)
    splits = datasets.load(config_of(tmp_path))
    assert sum(len(split.images) for split in splits[:3]) == len(contents)
    assert all((split.images == 50).all() for split in splits[:3])
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
@pytest.mark.parametrize("high", [1, 255, 65535])
def test_gray_values_are_scaled_by_their_range(mode, high):
    ramp = np.linspace(0, high, 256).round(0 if mode != "F" else 6).reshape(1, 256)
    kinds = {"F": np.float32, "I": np.int32, "I;16": np.uint16}
    image = Image.fromarray(np.repeat(ramp, 256, 0).astype(kinds[mode]))
    assert image.mode == mode
    pixels = decode(encoded(image, "TIFF"), 256, 1, resize_mode="crop")[0, :, 0].astype(int)
    expected = np.arange(256) if high > 1 or mode == "F" else ramp[0]
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("values", [[-3.0, 1.0], [0.0, 70000.0], [0.0, np.nan], [0.0, np.inf]])
def test_gray_values_of_other_ranges_are_unreadable(values):
    image = Image.fromarray(np.tile(np.float32(values), (8, 4)))
    with pytest.raises(ValueError, match="its values go from"):
        decode(encoded(image, "TIFF"), 8, 1, resize_mode="crop")


def config_of(tmp_path, **settings):
    given = {
        "name": "folder", "image_size": 16, "channels": 3, "path": str(tmp_path / "data"),
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    return DataConfig(**given | settings)


def cached_files(folder):
    return [place for place in folder.rglob("*") if place.is_file() and place.name != ".lock"]


def test_what_is_decoded_is_read_and_other_pictures_or_sizes_are_decoded(tmp_path, capsys):
    root = pictures.write_folder(tmp_path / "data")
    config = config_of(tmp_path)

    def lines():
        return capsys.readouterr().out.splitlines()

    first = datasets.load(config)
    assert [line.split(" to ")[0] for line in lines()] == [
        "train: decoding 42 pictures", "validation: decoding 9 pictures",
        "test: decoding 9 pictures",
    ]  # fmt: skip
    np.testing.assert_array_equal(datasets.load(config).train.images, first.train.images)
    assert lines() == []
    cropped = datasets.load(replace(config, random_crop=True))
    assert len(lines()) == 1 and cropped.train.images.shape == (42, 18, 18, 3)
    changed = next((root / "train").rglob("000.jpg"))
    changed.write_bytes(encoded(picture(77)))
    other = datasets.load(config)
    assert len(lines()) == 1 and (other.train.images[0] != first.train.images[0]).any()


def test_many_threads_decode_what_one_does(tmp_path):
    big = {"train": pictures.split(150), "test": pictures.split(3)}
    pictures.write_folder(tmp_path / "data", big)
    loaded = [
        datasets.load(config_of(tmp_path, workers=n, cache=str(tmp_path / str(n)))) for n in (1, 3)
    ]
    for one, other in zip(*(part[:3] for part in loaded), strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def harmed(root, share):
    """Every so many pictures of the training split made unreadable, each in another way."""
    files = sorted((root / "train").rglob("*.jpg"))
    bad = files[:: round(1 / share)]
    for i, file in enumerate(bad):
        content = file.read_bytes()
        file.write_bytes([
            b"", content[: len(content) // 2], b"no picture", bytes(len(content)),
            content[:4] + bytes(200) + content[204:],
        ][i % 5])  # fmt: skip
    return files, bad


def test_unreadable_pictures_are_named_and_left_out(tmp_path, capsys):
    root = pictures.write_folder(tmp_path / "data")
    whole = datasets.load(config_of(tmp_path))
    files, bad = harmed(root, 1 / 9)
    config = config_of(tmp_path, max_corrupt_fraction=0.2)
    splits = datasets.load(config)
    last = capsys.readouterr().out.splitlines()[-1]
    kept = [i for i, file in enumerate(files) if file not in bad]
    np.testing.assert_array_equal(splits.train.images, whole.train.images[kept])
    np.testing.assert_array_equal(splits.train.labels, whole.train.labels[kept])
    assert f"{len(bad)} of 42 pictures cannot be read" in last
    listed = next((tmp_path / "cache").glob("*/skipped.txt")).read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [str(f.relative_to(root)) for f in bad]
    # The share is asked for each time, of all splits together, and what is left out is said.
    datasets.load(config)
    assert capsys.readouterr().out.splitlines() == [last]
    with pytest.raises(UserError, match="listed in .*skipped.txt. Fix or remove them"):
        datasets.load(replace(config, max_corrupt_fraction=0.05))


def test_unreadable_pictures_of_all_splits_are_summed(tmp_path):
    root = pictures.write_folder(tmp_path / "data")
    for split in pictures.SPLITS:
        next((root / split).rglob("*.jpg")).write_bytes(b"no picture")
    assert (
        len(datasets.load(config_of(tmp_path, max_corrupt_fraction=0.05)).test.images) == 8
    )  # 3 of 60
    with pytest.raises(UserError, match="train: 1 of 42 .*; validation: 1 of 9 .*; test: 1 of 9"):
        datasets.load(config_of(tmp_path, max_corrupt_fraction=0.04))


def test_a_split_of_which_nothing_can_be_read(tmp_path):
    root = pictures.write_folder(tmp_path / "data", pictures.SPLITS | {"test": pictures.split(1)})
    next((root / "test").rglob("*.jpg")).write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(UserError, match="no picture of the test split can be read"):
            datasets.load(config_of(tmp_path))


@pytest.mark.parametrize(
    ("name", "harm"),
    [("images.u8", "cut"), ("about.json", "cut"), ("images.u8", "flip"), ("about.json", "swap")],
)
def test_a_damaged_entry_is_decoded_again(tmp_path, name, harm):
    pictures.write_folder(tmp_path / "data")
    expected = datasets.load(config_of(tmp_path)).train
    expected = expected._replace(images=expected.images.copy())
    for file in (tmp_path / "cache").glob(f"*/{name}"):
        content = bytearray(file.read_bytes())
        if harm == "cut":
            del content[-50:]
        elif harm == "flip":
            content[len(content) // 2] ^= 1
        else:  # two pictures change their labels
            assert b'"kept": [0, 1, 2, 3, 4, 5,' in content
            content = content.replace(b'"kept": [0, 1, 2, 3, 4, 5,', b'"kept": [5, 1, 2, 3, 4, 0,')
        file.write_bytes(content)
    found = datasets.load(config_of(tmp_path)).train
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_the_disks_trouble_is_not_the_pictures(tmp_path, monkeypatch):
    pictures.write_folder(tmp_path / "data")

    def broken(self, number):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a.jpg")

    monkeypatch.setattr(Files, "__getitem__", broken)
    with pytest.raises(UserError, match=r"a\.jpg cannot be read \(Input/output error\)"):
        datasets.load(config_of(tmp_path))
    assert cached_files(tmp_path / "cache") == []


SCRIPT = """
import sys
from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.errors import report

config = DataConfig(name="folder", image_size=16, channels=3, path={path!r}, cache={cache!r})
sys.exit(report(lambda: datasets.load(config)))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_decoding_that_a_signal_ends_leaves_nothing_that_counts(tmp_path, signum):
    contents, labels = pictures.split(50)
    pictures.write_folder(tmp_path / "data", {"train": (contents * 40, labels * 40)})
    config = config_of(tmp_path)
    script = SCRIPT.format(path=config.path, cache=config.cache)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=commands.ROOT, text=True, stderr=subprocess.PIPE
    )
    while not list((tmp_path / "cache").rglob("*partial*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signum and not err, err
    kept = datasets.load(config).train.images
    assert not list((tmp_path / "cache").rglob("*partial*"))
    expected = datasets.load(replace(config, cache=str(tmp_path / "other"))).train.images
    np.testing.assert_array_equal(kept, expected)


def test_an_interrupt_in_a_notebook_drops_what_has_not_begun(tmp_path, monkeypatch):
    pictures.write_folder(tmp_path / "data", {"train": pictures.split(600)})
    read = []
    of_file = Files.__getitem__

    def interrupt(self, count):
        raise KeyboardInterrupt

    def count_and_read(self, number):
        read.append(number)
        return of_file(self, number)

    monkeypatch.setattr("taming_jax.progress.Progress.update", interrupt)
    monkeypatch.setattr(Files, "__getitem__", count_and_read)
    with pytest.raises(KeyboardInterrupt):
        datasets.load(config_of(tmp_path, workers=1))
    assert len(read) < 400 and cached_files(tmp_path / "cache") == []


def test_the_same_pictures_are_decoded_once_at_a_time(tmp_path, capsys):
    contents, labels = pictures.split(50)
    pictures.write_folder(tmp_path / "data", {"train": (contents * 4, labels * 4)})
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(datasets.load, [config_of(tmp_path)] * 2)
    np.testing.assert_array_equal(one.train.images, other.train.images)
    assert capsys.readouterr().out.count(": decoding ") == 3


def test_a_full_disk_is_a_sentence_and_leaves_no_half_cache(tmp_path, monkeypatch):
    pictures.write_folder(tmp_path / "data")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="the disk is full, .* another --data.cache"):
        datasets.load(config_of(tmp_path))
    assert cached_files(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_made_is_named_as_such(tmp_path):
    pictures.write_folder(tmp_path / "data")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match="the image cache .* another --data.cache"):
            datasets.load(config_of(tmp_path, cache=str(place)))


def test_the_cache_knows_its_version(tmp_path, monkeypatch):
    pictures.write_folder(tmp_path / "data")
    datasets.load(config_of(tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    datasets.load(config_of(tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 6
