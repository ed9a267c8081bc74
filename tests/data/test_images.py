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
from tests.data.pictures import encode, make_picture


def test_crop_resizes_the_center_square_with_antialiasing():
    image = make_picture(1, 90, 60)
    decoded = decode(encode(image, "PNG"), 20, 3, resize_mode="crop")
    expected = image.resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    np.testing.assert_array_equal(decoded, np.asarray(expected))
    squeezed = decode(encode(image, "PNG"), 20, 3, resize_mode="squeeze")
    expected = image.resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squeezed, np.asarray(expected))
    # Fine stripes become gray, not other stripes.
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (128, 64)))
    gray = decode(encode(stripes, "PNG"), 13, 1, resize_mode="crop")
    assert gray.shape == (13, 13, 1) and abs(gray.astype(int) - 127).max() < 40


def test_a_picture_is_rotated_according_to_its_exif_orientation():
    image = make_picture(2, 60, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    decoded = decode(encode(image, "JPEG", exif=exif, quality=95), 60, 3, resize_mode="crop")
    expected = np.rot90(np.asarray(image), -1).astype(int)
    assert np.abs(decoded - expected).mean() < 8 < np.abs(decoded - np.asarray(image)).mean()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "JPEG", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_of_every_format_and_mode_are_decoded(image_format, mode):
    image = make_picture(3, 48, 48, mode)
    options = {"lossless": True} if image_format == "WEBP" else {}
    decoded = decode(encode(image, image_format, **options), 48, 3, resize_mode="crop")
    reference = np.asarray(image.convert("RGB")).astype(int)
    assert decoded.shape == (48, 48, 3) and np.abs(decoded - reference).mean() < 12


def test_palettes_cmyk_transparency_and_16_bit_pictures_are_decoded():
    image = make_picture(4, 32, 32)
    reference = np.asarray(image).astype(int)

    def error(content):
        return np.abs(decode(content, 32, 3, resize_mode="crop") - reference).mean()

    assert error(encode(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")) < 12
    assert error(encode(image.convert("CMYK"), "JPEG", quality=95)) < 12
    clear = image.copy()
    clear.putalpha(0)
    assert (decode(encode(clear, "PNG"), 32, 3, resize_mode="crop") == 255).all(), (
        "transparent pixels become white"
    )
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    gray = decode(encode(deep, "PNG"), 32, 1, resize_mode="crop")
    assert np.abs(gray[..., 0].astype(int) - np.asarray(image.convert("L"))).max() <= 1


def test_a_long_thin_picture_is_decoded_without_much_memory():
    decoded = decode(encode(Image.new("RGB", (30_000, 3), "red"), "PNG"), 32, 3, resize_mode="crop")
    assert (decoded == [255, 0, 0]).all()


def test_decompression_bombs_are_refused():
    for bomb in (
        encode(Image.new("L", (1000, 1000)), "PNG"),
        encode(Image.new("L", (1000, 1000)), "JPEG", progressive=True),
    ):
        with pytest.raises(
            ValueError, match="decoding takes .* MiB; --data.max-decoded-mib allows"
        ):
            decode(bomb, 32, 3, resize_mode="crop", max_mib=2)
    drafted = encode(Image.new("L", (1000, 1000), 200), "JPEG")  # decoded at an eighth
    assert (decode(drafted, 32, 3, resize_mode="crop", max_mib=1) == 200).all()


def test_postscript_is_not_run():
    with pytest.raises(ValueError, match="PostScript"):
        decode(encode(make_picture(20), "EPS"), 8, 3, "crop")


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_icons_are_refused_before_they_are_decoded(kind):
    with pytest.raises(ValueError, match="icons"):
        decode(encode(Image.new("RGB", (64, 64)), kind), 8, 3, "crop")


def test_large_pictures_and_texts_are_read(tmp_path, recwarn):
    """Pillow's own limits would refuse these files or warn about them."""
    large = encode(Image.new("L", (18_000, 10_100), 50), "JPEG")
    info = PngInfo()
    info.add_text("note", "x" * 2**21, zip=True)
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\x09" + b"\x01\x12\0\x03\xff\xff\xff\xff"
    contents = {
        "large.jpg": large,
        "text.png": encode(Image.new("L", (40, 40), 50), "PNG", pnginfo=info),
        "profile.png": encode(Image.new("L", (40, 40), 50), "PNG", icc_profile=bytes(3 * 2**20)),
        "exif.jpg": encode(Image.new("L", (40, 40), 50), "JPEG", exif=exif),
    }
    (tmp_path / "data").mkdir()
    for name, content in contents.items():
        (tmp_path / "data" / name).write_bytes(content)
    splits = datasets.load(make_config(tmp_path))
    assert sum(len(split.images) for split in splits[:3]) == len(contents)
    assert all((split.images == 50).all() for split in splits[:3])
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
@pytest.mark.parametrize("high", [1, 255, 1000, 4000, 60000])
def test_gray_values_are_scaled_by_their_range(mode, high):
    kinds = {"F": np.float32, "I": np.int32, "I;16": np.uint16}
    ramp = np.linspace(0, high, 256).astype(kinds[mode])
    image = Image.fromarray(np.tile(ramp, (256, 1)))
    assert image.mode == mode
    pixels = decode(encode(image, "TIFF"), 256, 1, resize_mode="crop")[0, :, 0].astype(int)
    full = {1: 1, 255: 255, 1000: 1023, 4000: 4095, 60000: 65535}[high]
    assert np.abs(pixels - ramp * (255 / full)).max() <= 1
    assert pixels.max() > 230


@pytest.mark.parametrize("values", [[-3.0, 1.0], [0.0, 70000.0], [0.0, np.nan], [0.0, np.inf]])
def test_gray_values_of_other_ranges_are_unreadable(values):
    image = Image.fromarray(np.tile(np.float32(values), (8, 4)))
    with pytest.raises(ValueError, match="its values range from"):
        decode(encode(image, "TIFF"), 8, 1, resize_mode="crop")


def make_config(tmp_path, **settings):
    defaults = {
        "name": "folder", "image_size": 16, "channels": 3, "path": str(tmp_path / "data"),
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    return DataConfig(**defaults | settings)


def cached_files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def test_decoded_pictures_are_cached_until_a_picture_or_the_size_changes(tmp_path, capsys):
    root = pictures.write_folder(tmp_path / "data")
    config = make_config(tmp_path)

    def read_output_lines():
        return capsys.readouterr().out.splitlines()

    first = datasets.load(config)
    assert [line.split(" to ")[0] for line in read_output_lines()] == [
        "train: decoding 42 pictures", "validation: decoding 9 pictures",
        "test: decoding 9 pictures",
    ]  # fmt: skip
    np.testing.assert_array_equal(datasets.load(config).train.images, first.train.images)
    assert read_output_lines() == []
    cropped = datasets.load(replace(config, random_crop=True))
    assert len(read_output_lines()) == 1 and cropped.train.images.shape == (42, 18, 18, 3)
    changed_file = next((root / "train").rglob("000.jpg"))
    changed_file.write_bytes(encode(make_picture(77)))
    changed_splits = datasets.load(config)
    assert (
        len(read_output_lines()) == 1
        and (changed_splits.train.images[0] != first.train.images[0]).any()
    )


def test_several_threads_decode_the_same_images_as_one(tmp_path):
    large_splits = {"train": pictures.make_split(150), "test": pictures.make_split(3)}
    pictures.write_folder(tmp_path / "data", large_splits)
    loaded = [
        datasets.load(make_config(tmp_path, workers=n, cache=str(tmp_path / str(n))))
        for n in (1, 3)
    ]
    for one, other in zip(*(part[:3] for part in loaded), strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def damage_pictures(root, fraction):
    """Damages a fraction of the training pictures in various ways. Returns all training files and
    the damaged ones."""
    files = sorted((root / "train").rglob("*.jpg"))
    bad = files[:: round(1 / fraction)]
    for i, file in enumerate(bad):
        content = file.read_bytes()
        file.write_bytes([
            b"", content[: len(content) // 2], b"no picture", bytes(len(content)),
            content[:4] + bytes(200) + content[204:],
        ][i % 5])  # fmt: skip
    return files, bad


def test_unreadable_pictures_are_reported_and_left_out(tmp_path, capsys):
    root = pictures.write_folder(tmp_path / "data")
    intact = datasets.load(make_config(tmp_path))
    files, bad = damage_pictures(root, 1 / 9)
    config = make_config(tmp_path, max_corrupt_fraction=0.2)
    splits = datasets.load(config)
    warning = capsys.readouterr().out.splitlines()[-1]
    kept = [i for i, file in enumerate(files) if file not in bad]
    np.testing.assert_array_equal(splits.train.images, intact.train.images[kept])
    np.testing.assert_array_equal(splits.train.labels, intact.train.labels[kept])
    assert f"{len(bad)} of 42 pictures cannot be read" in warning
    listed_lines = next((tmp_path / "cache").glob("*/skipped.txt")).read_text().splitlines()
    assert [line.split("\t")[0] for line in listed_lines] == [str(f.relative_to(root)) for f in bad]
    # Each load checks the fraction over all splits and prints the warning again.
    datasets.load(config)
    assert capsys.readouterr().out.splitlines() == [warning]
    with pytest.raises(UserError, match="listed in .*skipped.txt. Fix or remove them"):
        datasets.load(replace(config, max_corrupt_fraction=0.05))


def test_unreadable_pictures_of_all_splits_are_summed(tmp_path):
    root = pictures.write_folder(tmp_path / "data")
    for split in pictures.SPLITS:
        next((root / split).rglob("*.jpg")).write_bytes(b"no picture")
    # 3 of 60 pictures are unreadable.
    splits = datasets.load(make_config(tmp_path, max_corrupt_fraction=0.05))
    assert len(splits.test.images) == 8
    with pytest.raises(UserError, match="train: 1 of 42 .*; validation: 1 of 9 .*; test: 1 of 9"):
        datasets.load(make_config(tmp_path, max_corrupt_fraction=0.04))


def test_a_split_without_any_readable_picture_is_refused(tmp_path):
    root = pictures.write_folder(
        tmp_path / "data", pictures.SPLITS | {"test": pictures.make_split(1)}
    )
    next((root / "test").rglob("*.jpg")).write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(UserError, match="no picture of the test split can be read"):
            datasets.load(make_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "damage"),
    [("images.u8", "cut"), ("about.json", "cut"), ("images.u8", "flip"), ("about.json", "swap")],
)
def test_a_damaged_cache_entry_is_decoded_again(tmp_path, name, damage):
    pictures.write_folder(tmp_path / "data")
    expected = datasets.load(make_config(tmp_path)).train
    expected = expected._replace(images=expected.images.copy())
    for file in (tmp_path / "cache").glob(f"*/{name}"):
        content = bytearray(file.read_bytes())
        if damage == "cut":
            del content[-50:]
        elif damage == "flip":
            content[len(content) // 2] ^= 1
        else:  # two pictures swap their labels
            assert b'"kept": [0, 1, 2, 3, 4, 5,' in content
            content = content.replace(b'"kept": [0, 1, 2, 3, 4, 5,', b'"kept": [5, 1, 2, 3, 4, 0,')
        file.write_bytes(content)
    loaded = datasets.load(make_config(tmp_path)).train
    np.testing.assert_array_equal(loaded.images, expected.images)
    np.testing.assert_array_equal(loaded.labels, expected.labels)


def test_a_read_error_of_the_disk_is_not_treated_as_a_damaged_picture(tmp_path, monkeypatch):
    pictures.write_folder(tmp_path / "data")

    def raise_io_error(self, number):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a.jpg")

    monkeypatch.setattr(Files, "__getitem__", raise_io_error)
    with pytest.raises(UserError, match=r"a\.jpg cannot be read \(Input/output error\)"):
        datasets.load(make_config(tmp_path))
    assert cached_files(tmp_path / "cache") == []


SCRIPT = """
import sys
from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.errors import report

config = DataConfig(name="folder", image_size=16, channels=3, path={path!r}, cache={cache!r})
sys.exit(report(lambda: datasets.load(config)))
"""


@pytest.mark.parametrize(
    "signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_an_interrupted_decoding_leaves_no_valid_cache_entry(tmp_path, signum):
    contents, labels = pictures.make_split(50)
    pictures.write_folder(tmp_path / "data", {"train": (contents * 40, labels * 40)})
    config = make_config(tmp_path)
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


def test_an_interrupt_in_a_notebook_cancels_the_pictures_that_are_not_yet_read(
    tmp_path, monkeypatch
):
    pictures.write_folder(tmp_path / "data", {"train": pictures.make_split(600)})
    read = []
    read_picture = Files.__getitem__

    def interrupt(self, count):
        raise KeyboardInterrupt

    def count_and_read(self, number):
        read.append(number)
        return read_picture(self, number)

    monkeypatch.setattr("taming_jax.progress.Progress.update", interrupt)
    monkeypatch.setattr(Files, "__getitem__", count_and_read)
    with pytest.raises(KeyboardInterrupt):
        datasets.load(make_config(tmp_path, workers=1))
    assert len(read) < 400 and cached_files(tmp_path / "cache") == []


def test_concurrent_loads_decode_the_same_pictures_once(tmp_path, capsys):
    contents, labels = pictures.make_split(50)
    pictures.write_folder(tmp_path / "data", {"train": (contents * 4, labels * 4)})
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(datasets.load, [make_config(tmp_path)] * 2)
    np.testing.assert_array_equal(one.train.images, other.train.images)
    assert capsys.readouterr().out.count(": decoding ") == 3


def test_a_full_disk_is_reported_and_leaves_no_partial_cache(tmp_path, monkeypatch):
    pictures.write_folder(tmp_path / "data")

    def raise_no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", raise_no_space)
    with pytest.raises(UserError, match="the disk is full, .* another --data.cache"):
        datasets.load(make_config(tmp_path))
    assert cached_files(tmp_path / "cache") == []


def test_a_cache_folder_that_cannot_be_created_is_reported(tmp_path):
    pictures.write_folder(tmp_path / "data")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match="the image cache .* another --data.cache"):
            datasets.load(make_config(tmp_path, cache=str(place)))


def test_another_cache_version_decodes_the_pictures_again(tmp_path, monkeypatch):
    pictures.write_folder(tmp_path / "data")
    datasets.load(make_config(tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    datasets.load(make_config(tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_skipped_pictures_are_decoded_again_with_another_memory_limit(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(11):
        size = 600 if i == 0 else 40
        (tmp_path / "data" / f"{i}.png").write_bytes(encode(Image.new("L", (size, size)), "PNG"))

    def count(**settings):
        splits = datasets.load(make_config(tmp_path, **settings))
        return sum(len(split.images) for split in splits[:3])

    assert count(max_decoded_mib=1) == 10
    assert "decoding takes 2 MiB; --data.max-decoded-mib allows 1" in capsys.readouterr().out
    assert count() == 11
    assert "decoding" in capsys.readouterr().out
    assert count(max_decoded_mib=1) == 11  # it is decoded already
    assert "decoding" not in capsys.readouterr().out
