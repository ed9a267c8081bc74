"""Tests with the user's own pictures in both stages: streamed or resident, interrupted, damaged,
and exchanged."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from taming_jax.training.checkpoints import Store
from tests import commands, small_runs
from tests.data import pictures
from tests.data.test_images import damage_pictures
from tests.small_runs import Killed, assert_rows_close, assert_same_run, kill_at, read_rows

STEPS = 12  # with 8 of 42 images per step: more than two epochs
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
def root(tmp_path_factory):
    """A folder that contains a folder of pictures and a cache."""
    root = tmp_path_factory.mktemp("pictures")
    pictures.write_folder(root / "my pictures ü")
    return root


def data_flags(root, workdir):
    return [
        "--data.path", root / "my pictures ü", "--data.cache", root / "cache", "--workdir",
        workdir,
    ]  # fmt: skip


def train_in_subprocess(root, workdir, *settings, devices=1):
    status, out, err = commands.run(*STAGE1, *data_flags(root, workdir), *settings, devices=devices)
    assert status == 0, err
    return out


def train(root, workdir, *settings):
    status, out, err = commands.run_here(
        *STAGE1, *data_flags(root, workdir), "--devices", 1, *settings
    )
    assert status == 0, err
    return out


def read_arrays(workdir):
    return Store(workdir, "vqgan").read(STEPS).arrays


def read_log(workdir):
    lines = (workdir / "metrics" / "vqgan.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def resident(root):
    train(root, root / "resident")
    return root / "resident"


@pytest.fixture(scope="module")
def adversarial(root):
    train(root, root / "adversarial", *ADVERSARIAL)
    return root / "adversarial"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_killed_streaming_command_resumes_bit_for_bit(root, adversarial, tmp_path, devices):
    streaming = ("--data.resident-share", 0, *ADVERSARIAL)
    train_in_subprocess(root, tmp_path / "uninterrupted", *streaming, devices=devices)
    process = commands.start(
        *STAGE1, *data_flags(root, tmp_path / "killed"), *streaming, devices=devices
    )
    while not (tmp_path / "killed" / "checkpoints" / "vqgan" / "4").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    steps = Store(tmp_path / "killed", "vqgan").steps()
    assert steps and steps[-1] < STEPS and steps[-1] * 8 % 42, (
        "the run stopped in the middle of an epoch"
    )
    train_in_subprocess(root, tmp_path / "killed", *streaming, devices=devices)
    expected = read_arrays(tmp_path / "uninterrupted")
    for path, array in read_arrays(tmp_path / "killed").items():
        np.testing.assert_array_equal(array, expected[path], err_msg=".".join(path))
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "uninterrupted")
    for row, other in zip(read_log(tmp_path / "uninterrupted"), read_log(adversarial), strict=True):
        assert row["l1"] == pytest.approx(other["l1"], rel=1e-3), "streaming reads the same batches"
    speed = (tmp_path / "uninterrupted" / "metrics" / "vqgan_speed.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["waiting"] <= 1 for line in speed) and len(speed) >= STEPS


# The discriminator is off, because only the feeds differ and the programs compile faster.
SMALL = {
    "data__name": "folder", "data__channels": 3, "data__random_crop": True, "data__mirror": True,
    "vqgan__discriminator_start": 1.0, "vqgan__steps": STEPS, "vqgan__checkpoint_every": 4,
}  # fmt: skip


def train_small(root, workdir, **settings):
    folders = {"data__path": str(root / "my pictures ü"), "data__cache": str(root / "cache")}
    small_runs.train(workdir, **SMALL | folders | settings)


@pytest.fixture(scope="module")
def small_resident(root):
    """The folder of a small run that keeps its pictures in the memory of the device."""
    train_small(root, root / "small")
    return root / "small"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_killed_streaming_run_resumes_bit_for_bit(root, small_resident, tmp_path, devices):
    streaming = {"data__resident_share": 0.0, "devices": devices}
    train_small(root, tmp_path / "uninterrupted", **streaming)
    with pytest.raises(Killed):
        train_small(root, tmp_path / "killed", on_step=kill_at(10), **streaming)
    step = small_runs.list_saved_steps(tmp_path / "killed")[-1]
    assert step == 8 and step * 8 % 42, "the run stopped in the middle of an epoch"
    train_small(root, tmp_path / "killed", **streaming)
    assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted", STEPS)
    assert_rows_close(read_rows(tmp_path / "uninterrupted"), read_rows(small_resident), 1e-3)
    speed = (tmp_path / "uninterrupted" / "metrics" / "vqgan_speed.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["waiting"] <= 1 for line in speed) and len(speed) >= STEPS


@pytest.mark.slow
def test_a_folder_of_pictures_can_be_trained_on_and_sampled(root, resident, tmp_path):
    """Stage 2 needs the data, but sampling by class name does not. Each command runs in its own
    process."""
    workdir = shutil.copytree(resident, tmp_path / "run")
    status, _, err = commands.run(*STAGE2, *data_flags(root, workdir))
    assert status == 0, err
    status, _, err = commands.run(
        "scripts/sample.py", "--workdir", workdir, "--classes", "zèbre", "--per-class", 2, "--out",
        tmp_path / "s.npz",
    )  # fmt: skip
    assert status == 0, err
    images = np.load(tmp_path / "s.npz")["images"]
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8


@pytest.mark.slow
def test_a_run_cannot_resume_with_other_pictures(root, resident, tmp_path):
    other = shutil.copytree(root / "my pictures ü", tmp_path / "my pictures ü")
    next((other / "train").rglob("*.jpg")).unlink()
    before = {p: p.read_bytes() for p in resident.rglob("*") if p.is_file()}
    for script in (STAGE1, STAGE2):
        status, _, err = commands.run_here(*script, *data_flags(tmp_path, resident))
        assert status == 2 and err.count("\n") == 1, err
        assert "other data: there are 41 training images, not 42" in err
    assert {p: p.read_bytes() for p in resident.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_damaged_pictures_are_left_out_unless_there_are_too_many(root, tmp_path):
    shutil.copytree(root / "my pictures ü", tmp_path / "my pictures ü")
    damage_pictures(tmp_path / "my pictures ü", 1 / 8)
    out = train(tmp_path, tmp_path / "run", "--vqgan.steps", 1)
    assert "6 of 42 pictures cannot be read" in out
    (skipped_list,) = (tmp_path / "cache").glob("*/skipped.txt")
    assert len(skipped_list.read_text().splitlines()) == 6
    shutil.copytree(root / "my pictures ü", tmp_path / "most" / "my pictures ü")
    damage_pictures(tmp_path / "most" / "my pictures ü", 1)
    status, _, err = commands.run_here(*STAGE1, *data_flags(tmp_path / "most", tmp_path / "none"))
    assert status == 2 and "42 of 42 pictures cannot be read" in err
    assert not (tmp_path / "none").exists()
