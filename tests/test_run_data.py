"""Tests of runs whose dataset has moved, is a different one, or was never known."""

import shutil

import jax
import numpy as np
import pytest

import taming_jax
from taming_jax import progress
from taming_jax.config.load import write_config
from taming_jax.data import datasets
from taming_jax.errors import UserError
from taming_jax.interop.imports import Model, write_run
from tests import commands
from tests.data import pictures

SETTINGS = {
    "data.name": "folder", "data.image_size": 8, "vqgan.channels": 4, "vqgan.multipliers": (1,),
    "vqgan.latent_channels": 4, "vqgan.codebook_size": 16, "vqgan.batch_size": 8,
    "vqgan.discriminator_layers": 1, "vqgan.discriminator_filters": 4,
    "vqgan.discriminator_start": 1.0, "vqgan.steps": 1, "devices": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run, its training pictures, which were moved from `old` to `new`, and `other`
    pictures."""
    root = tmp_path_factory.mktemp("moved")
    pictures.write_folder(root / "old")
    other = {"train": pictures.make_split(30, 300), "test": pictures.make_split(8, 400)}
    pictures.write_folder(root / "other", other)
    overrides = {"data.path": str(root / "old"), "data.cache": str(root / "cache")}
    config = taming_jax.load_config(
        "birds_tiny", SETTINGS | overrides | {"workdir": str(root / "run")}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taming_jax.training.vqgan.VQGANStage.draw_figures", lambda *_: None)
        taming_jax.train(config, "vqgan")
    (root / "old").rename(root / "new")
    return root


@pytest.fixture
def evaluate(capsys):
    """Returns a function that runs the command in this process and returns its exit status, stdout,
    and stderr."""

    def call(*arguments):
        status = commands.run_for_status("scripts/evaluate.py", *arguments, "--devices", 1)
        return status, *capsys.readouterr()

    return call


def test_moved_data_is_recognized_at_its_new_path(root, capsys):
    run = taming_jax.load_run(root / "run")
    with pytest.raises(UserError, match=f"--data.path {root / 'old'} is not a folder"):
        run.tokens("test")
    new = {"name": "folder", "path": root / "new"}
    moved = taming_jax.load_run(root / "run", data=new)
    images = datasets.load(moved.config.data).test.images
    expected = run.encode(images).reshape(len(images), -1)
    capsys.readouterr()
    np.testing.assert_array_equal(moved.tokens("test").images, expected)
    assert "The run was trained on this data." in capsys.readouterr().out
    tokens = run.with_data({"path": root / "new"}).tokens("test")
    np.testing.assert_array_equal(tokens.images, expected)


def test_the_path_may_be_changed_in_config_json(root, tmp_path):
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    config = taming_jax.load_config(
        workdir / "config.json", {"data.path": str(root / "new"), "data.workers": 1}
    )
    write_config(config, workdir / "config.json")
    run = taming_jax.load_run(workdir)
    assert run.config.data.path == str(root / "new") and len(run.tokens("test").images) == 9


def test_other_data_is_refused_unless_its_name_is_given(root, tmp_path, capsys):
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    data = {"path": root / "other"}
    message = (
        r"trained on other data: there are .* to use this data instead, add --data.name folder"
    )
    with pytest.raises(UserError, match=message):
        taming_jax.load_run(workdir, data).tokens("test")
    named = data | {"name": "folder"}
    assert len(taming_jax.load_run(workdir, named).tokens("test").images) == 8
    assert "The run was trained on other data: there are" in capsys.readouterr().out
    config = taming_jax.load_config(workdir / "config.json", {"data.path": str(data["path"])})
    write_config(config, workdir / "config.json")
    with pytest.raises(UserError, match=message):
        taming_jax.load_run(workdir).tokens("test")


def test_another_dataset_does_not_use_the_path_of_the_previous_one(root):
    run = taming_jax.load_run(root / "run", data={"name": "synthetic"})
    assert run.config.data.path is None and run.config.data.name == "synthetic"
    assert len(run.tokens("test").images) == 64


def test_data_that_does_not_fit_the_networks_is_refused(root):
    for settings, message in (
        ({"image_size": 32}, "--data.image-size is 32, but this run's networks take 8"),
        ({"channels": 1}, "--data.channels is 1, but this run's networks take 3"),
        ({"pth": "x"}, "there is no setting 'data.pth'; did you mean 'data.path'"),
    ):
        with pytest.raises(UserError, match=message):
            taming_jax.load_run(root / "run", data=settings)


@pytest.mark.slow
def test_an_imported_run_is_evaluated_on_the_users_own_data(
    root, prior_workdir, tmp_path, evaluate, monkeypatch
):
    """One command evaluates it without training. Samples need a prior with the same number of
    classes."""
    trained = taming_jax.load_run(prior_workdir)
    config = taming_jax.load_config(prior_workdir / "config.json", {"data.name": "unknown"})
    networks = {"generator": trained.params, "transformer": trained.transformer}
    networks = jax.tree.map(np.asarray, networks)
    names = tuple(map(str, range(4)))
    write_run(tmp_path / "run", Model(config, names), networks)
    flags = ["--workdir", tmp_path / "run", "--features", "vgg"]
    status, _, err = evaluate(*flags)
    assert status == 2 and "the dataset of this imported run is not known" in err
    data = ["--data.name", "folder", "--data.path", root / "other", "--data.workers", 1]
    status, _, err = evaluate(*flags, *data, "--samples", 10)
    assert status == 2 and "the data has 3 classes and the prior" in err and "--samples 0" in err
    status, out, err = evaluate(*flags, *data, "--samples", 0)
    assert status == 0, err
    assert "reconstruction (8 images of the test split)" in out and "no prior yet" not in out
    assert "Warning: It is not known whether the run was trained on this data." in out
    status, _, err = evaluate(*flags, *data, "--samples", 0, "--data.test-share", 0)
    assert status == 2 and "--data.test-share is 0.0" in err
    # One picture can be measured, but has no distribution.
    few_splits = {"train": pictures.make_split(12, 500)}
    pictures.write_folder(tmp_path / "few", few_splits)
    data[3] = tmp_path / "few" / "train"
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    status, out, err = evaluate(*flags, *data, "--samples", 0)
    assert status == 0 and "reconstructions: 1 of 1 images" in err, err
    assert "psnr" in out and "FD-VGG16  " not in out
    assert "Warning: No Fréchet distance: it needs two images." in out
