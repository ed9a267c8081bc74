"""Tests of the playground's actions, compared with the run and with the commands that the page
shows."""

import base64
import io
import json
import math
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.table import REPORT, format_report
from taming_jax.playground.actions import MAX_IMAGES, Playground, Request, Stopped
from taming_jax.run import load_run
from tests import commands


@pytest.fixture(scope="module")
def playground(prior_workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground") / "a run"
    shutil.copytree(prior_workdir, folder)
    return Playground(load_run(folder))


def read_url(url):
    """Returns the pixels of a PNG file in a data URL, uint8 [h,w,c]."""
    kind, content = url.split(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    return pixels.reshape(*pixels.shape[:2], -1)


def encode_picture(pixels, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def make_picture(size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)


def run_command(command, out):
    """Runs a command that the page shows, with another output, and returns its images."""
    program, *arguments, _ = shlex.split(command)
    assert program == "taming-jax"
    status, _, err = commands.run_here("taming_jax/cli/__main__.py", *arguments, out)
    assert status == 0, err
    return np.load(out)["images"]


def run_code(code, name):
    """Runs the lines for a notebook, and returns one of their variables."""
    scope = {}
    exec(code, scope)
    return scope[name]


SETTINGS = {"seed": 7, "temperature": 0.8, "top_k": 5, "guidance_scale": (1.0, 3.0)}


def test_samples_equal_those_of_the_command_and_of_the_notebook(playground, tmp_path):
    result = playground.sample(Request(classes=(1, 0, 1), per_class=3, **SETTINGS))
    images = np.stack([read_url(picture["image"]) for picture in result["pictures"]])
    np.testing.assert_array_equal(
        read_url(result["sheet"]), np.concatenate([*images[:, :, :]], 1)
    )  # fmt: skip
    assert [picture["label"] for picture in result["pictures"]] == [1, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(images, run_command(result["command"], tmp_path / "s.npz"))
    np.testing.assert_array_equal(images, to_uint8(run_code(result["python"], "images")))
    for picture in result["pictures"]:
        assert np.ravel(picture["passes"]).tolist() == list(range(64))
    decoded = to_uint8(playground.run.decode([p["codes"] for p in result["pictures"]]))
    np.testing.assert_allclose(decoded, images.astype(int), atol=1)


@pytest.mark.parametrize("classes", [(), (1,)])
def test_completions_equal_those_of_the_command_and_of_the_notebook(
    playground, tmp_path, monkeypatch, classes
):
    keep = np.random.default_rng(1).random((8, 8)) < 0.5
    request = Request(
        picture=encode_picture(make_picture(40), "TIFF"), classes=classes, per_class=2,
        keep=tuple(map(tuple, keep.tolist())), **SETTINGS,
    )  # fmt: skip
    result = playground.complete(request)
    monkeypatch.chdir(tmp_path)
    for name, url in (("picture.png", result["original"]), ("mask.png", result["mask"])):
        (tmp_path / name).write_bytes(base64.b64decode(url.split(",")[1]))
    images = np.stack([read_url(picture["image"]) for picture in result["pictures"]])
    assert len(images) == 2 and (images[0] != images[1]).any()
    np.testing.assert_array_equal(images, run_command(result["command"], tmp_path / "c.npz"))
    np.testing.assert_array_equal(images, to_uint8(run_code(result["python"], "completions")))
    np.testing.assert_array_equal(np.array(result["pictures"][0]["passes"]) == -1, keep)


def test_a_reconstruction_and_its_error(playground):
    picture = make_picture()
    result = playground.reconstruct(Request(picture=encode_picture(picture)))
    np.testing.assert_array_equal(read_url(result["original"])[..., 0], picture)
    reconstruction = playground.run.reconstruct(picture[None, ..., None])[0]
    np.testing.assert_array_equal(read_url(result["image"]), reconstruction)
    difference = (picture.astype(float) - reconstruction[..., 0]) / 255
    assert result["meanError"] == pytest.approx(np.abs(difference).mean())
    assert result["psnr"] == pytest.approx(-10 * math.log10((difference**2).mean()))
    assert read_url(result["error"]).shape == (16, 16, 3)
    np.testing.assert_array_equal(
        to_uint8(run_code(result["python"], "images"))[0], reconstruction
    )  # fmt: skip


def test_a_changed_code_changes_the_picture_around_it(playground):
    before, after = np.zeros((8, 8), int), np.zeros((8, 8), int)
    after[0, 0] = 3
    results = [
        playground.decode(Request(codes=tuple(map(tuple, codes.tolist()))))
        for codes in (before, after)
    ]
    images = [read_url(result["image"]) for result in results]
    np.testing.assert_array_equal(images[1], to_uint8(playground.run.decode(after[None]))[0])
    assert (images[0] != images[1]).any()


def test_the_codebook_and_its_usage(playground, monkeypatch):
    monkeypatch.setattr("taming_jax.playground.actions.TILES_PER_REQUEST", 100)
    assert playground.codebook(Request())["count"] == 100
    codes = playground.run.config.vqgan.codebook_size
    result = playground.codebook(Request())
    sheet, columns = read_url(result["sheet"]), result["columns"]
    assert result["count"] == codes and len(sheet) == 2 * math.ceil(codes / columns)
    decoded = to_uint8(playground.run.decode(np.full((1, 4, 4), 77)))[0, 4:6, 4:6]
    row, column = divmod(77, columns)
    tile = sheet[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    np.testing.assert_allclose(tile, decoded.astype(int), atol=1)

    usage = playground.usage(Request())
    images = playground.run.load_data().validation.images
    counts = np.bincount(playground.run.encode(images).ravel(), minlength=codes)
    assert usage == {"counts": counts.tolist(), "images": len(images)}


def test_the_report_and_the_figures_are_those_of_the_run(playground, tmp_path):
    folder = playground.run.workdir
    (folder / "figures").mkdir(exist_ok=True)
    Image.fromarray(make_picture()).save(folder / "figures" / "loss.png")
    secret = tmp_path / "secret.png"
    Image.fromarray(make_picture(seed=1)).save(secret)
    (folder / "figures" / "link.png").symlink_to(secret)
    result = playground.report(Request())
    assert "has not been evaluated" in result["problem"] and result["report"] == ""
    figures = dict(result["figures"])
    assert "link" not in figures
    np.testing.assert_array_equal(read_url(figures["loss"])[..., 0], make_picture())

    report = {
        "features": "FID", "reconstruction": {"psnr": 21.5}, "samples": None, "warnings": ["few"],
        "protocol": {"hash": playground.run.hash_weights(), "images": 8, "split": "test",
                     "samples": 0},
    }  # fmt: skip
    (folder / REPORT).write_text(json.dumps(report))
    result = playground.report(Request())
    assert result["problem"] == "" and result["report"] == format_report(report)


def test_a_run_without_a_prior_has_no_settings_for_samples(vqgan_workdir):
    playground = Playground(load_run(vqgan_workdir))
    assert "settings" not in playground.description
    # The classes of an imported run may not be known.
    assert "classes" not in playground.description
    with pytest.raises(UserError, match="has no prior yet"):
        playground.sample(Request())


def test_too_many_images_are_refused_before_they_are_planned(playground):
    with pytest.raises(UserError, match=f"10{'0' * 12} images are too many"):
        playground.sample(Request(classes=(0,), per_class=10**13))
    assert MAX_IMAGES < 1000


def test_a_drawing_stops_when_nobody_waits_for_it(playground, monkeypatch):
    monkeypatch.setattr(playground, "is_stopped", lambda: True)
    with pytest.raises(Stopped):
        playground.sample(Request(classes=(0,)))
