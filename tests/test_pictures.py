"""One's own pictures through both stages: streamed or resident, stopped, harmed, exchanged."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from taming_jax.training.checkpoints import Store
from tests import commands, small_runs
from tests.data import pictures
from tests.data.test_images import harmed
from tests.small_runs import Killed, assert_rows_close, assert_same_run, kill_at, read_rows

STEPS = 12  # of 8 of 42 images: more than two epochs
STAGE1 = [
    "train_vqgan.py", "--config", "birds_tiny", "--data.name", "folder", "--data.image-size", "8",
    "--vqgan.channels", "4", "--vqgan.multipliers", "1", "--vqgan.batch-size", "8",
    "--vqgan.latent-channels", "8", "--vqgan.discriminator-layers", "1",
    "--vqgan.discriminator-filters", "4", "--vqgan.discriminator-start", "1", "--vqgan.steps",
    STEPS, "--vqgan.checkpoint-every", "4",
]  # fmt: skip
ADVERSARIAL = ("--vqgan.discriminator-start", 0.5)
STAGE2 = [
    "train_prior.py", "--config", "birds_tiny", "--prior.steps", "4", "--prior.batch-size", "8",
    "--prior.layers", "1", "--prior.width", "16", "--prior.augmented-versions", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, and a cache beside it."""
    place = tmp_path_factory.mktemp("pictures")
    pictures.write_folder(place / "my pictures ü")
    return place


def given(place, workdir):
    return [
        "--data.path", place / "my pictures ü", "--data.cache", place / "cache", "--workdir",
        workdir,
    ]  # fmt: skip


def trained(place, workdir, *settings, devices=1):
    status, out, err = commands.run(*STAGE1, *given(place, workdir), *settings, devices=devices)
    assert status == 0, err
    return out


def trained_here(place, workdir, *settings):
    status, out, err = commands.run_here(*STAGE1, *given(place, workdir), "--devices", 1, *settings)
    assert status == 0, err
    return out


def arrays(workdir):
    return Store(workdir, "vqgan").read(STEPS).arrays


def rows(workdir):
    lines = (workdir / "metrics" / "vqgan.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def resident(place):
    trained_here(place, place / "resident")
    return place / "resident"


@pytest.fixture(scope="module")
def adversarial(place):
    trained_here(place, place / "adversarial", *ADVERSARIAL)
    return place / "adversarial"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_streaming_run_that_is_killed_goes_on_bit_for_bit(place, adversarial, tmp_path, devices):
    streaming = ("--data.resident-share", 0, *ADVERSARIAL)
    trained(place, tmp_path / "whole", *streaming, devices=devices)
    process = commands.start(
        *STAGE1, *given(place, tmp_path / "killed"), *streaming, devices=devices
    )
    while not (tmp_path / "killed" / "checkpoints" / "vqgan" / "4").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    steps = Store(tmp_path / "killed", "vqgan").steps()
    assert steps and steps[-1] < STEPS and steps[-1] * 8 % 42, "in the middle of an epoch"
    trained(place, tmp_path / "killed", *streaming, devices=devices)
    expected = arrays(tmp_path / "whole")
    for path, array in arrays(tmp_path / "killed").items():
        np.testing.assert_array_equal(array, expected[path], err_msg=".".join(path))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    for row, other in zip(rows(tmp_path / "whole"), rows(adversarial), strict=True):
        assert row["l1"] == pytest.approx(other["l1"], rel=1e-3), "the batches are those"
    speed = (tmp_path / "whole" / "metrics" / "vqgan_speed.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["waiting"] <= 1 for line in speed) and len(speed) >= STEPS


# The feeds are what differs, so that the discriminator is left out, and sooner compiled.
SMALL = {
    "data__name": "folder", "data__channels": 3, "data__random_crop": True, "data__mirror": True,
    "vqgan__discriminator_start": 1.0, "vqgan__steps": STEPS, "vqgan__checkpoint_every": 4,
}  # fmt: skip


def train_small(place, workdir, **settings):
    folders = {"data__path": str(place / "my pictures ü"), "data__cache": str(place / "cache")}
    small_runs.train(workdir, **SMALL | folders | settings)


@pytest.fixture(scope="module")
def small_resident(place):
    """A small run that keeps its pictures in the device's memory."""
    train_small(place, place / "small")
    return place / "small"


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4]
)
def test_a_streaming_run_that_is_broken_goes_on_bit_for_bit(
    place, small_resident, tmp_path, devices
):
    streaming = {"data__resident_share": 0.0, "devices": devices}
    train_small(place, tmp_path / "whole", **streaming)
    with pytest.raises(Killed):
        train_small(place, tmp_path / "broken", on_step=kill_at(10), **streaming)
    step = small_runs.saved_steps(tmp_path / "broken")[-1]
    assert step == 8 and step * 8 % 42, "in the middle of an epoch"
    train_small(place, tmp_path / "broken", **streaming)
    assert_same_run(tmp_path / "broken", tmp_path / "whole", STEPS)
    assert_rows_close(read_rows(tmp_path / "whole"), read_rows(small_resident), 1e-3)
    speed = (tmp_path / "whole" / "metrics" / "vqgan_speed.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["waiting"] <= 1 for line in speed) and len(speed) >= STEPS


@pytest.mark.slow
def test_from_a_folder_to_samples(place, resident, tmp_path):
    """Stage 2 needs the data; sampling by name does not. Each command in a process of its own."""
    workdir = shutil.copytree(resident, tmp_path / "run")
    status, _, err = commands.run(*STAGE2, *given(place, workdir))
    assert status == 0, err
    status, _, err = commands.run(
        "scripts/sample.py", "--workdir", workdir, "--classes", "zèbre", "--per-class", 2, "--out",
        tmp_path / "s.npz",
    )  # fmt: skip
    assert status == 0, err
    images = np.load(tmp_path / "s.npz")["images"]
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8


@pytest.mark.slow
def test_a_run_refuses_to_go_on_with_other_pictures(place, resident, tmp_path):
    other = shutil.copytree(place / "my pictures ü", tmp_path / "my pictures ü")
    next((other / "train").rglob("*.jpg")).unlink()
    before = {p: p.read_bytes() for p in resident.rglob("*") if p.is_file()}
    for script in (STAGE1, STAGE2):
        status, _, err = commands.run_here(*script, *given(tmp_path, resident))
        assert status == 2 and err.count("\n") == 1, err
        assert "other data: there are 41 training images, not 42" in err
    assert {p: p.read_bytes() for p in resident.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_harmed_pictures_are_left_out_or_too_many(place, tmp_path):
    shutil.copytree(place / "my pictures ü", tmp_path / "my pictures ü")
    harmed(tmp_path / "my pictures ü", 1 / 8)
    out = trained_here(tmp_path, tmp_path / "run", "--vqgan.steps", 1)
    assert "6 of 42 pictures cannot be read" in out
    (listed,) = (tmp_path / "cache").glob("*/skipped.txt")
    assert len(listed.read_text().splitlines()) == 6
    shutil.copytree(place / "my pictures ü", tmp_path / "most" / "my pictures ü")
    harmed(tmp_path / "most" / "my pictures ü", 1)
    status, _, err = commands.run_here(*STAGE1, *given(tmp_path / "most", tmp_path / "none"))
    assert status == 2 and "42 of 42 pictures cannot be read" in err
    assert not (tmp_path / "none").exists()
