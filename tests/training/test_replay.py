"""Tests of the verification of runs: honest ones, and ones where something has been changed."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

from taming_jax.data import datasets
from taming_jax.errors import RunFailed, UserError
from taming_jax.parallel import distributed
from taming_jax.training import replay
from taming_jax.training.checkpoints import Store
from tests import commands, small_runs

SETTINGS = {
    "vqgan__steps": 6, "vqgan__checkpoint_every": 2, "vqgan__log_every": 2, "vqgan__eval_every": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of stage 1 with checkpoints at steps 4 and 6."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    small_runs.train(folder, **SETTINGS)
    return folder


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_an_honest_run_is_repeated_bit_for_bit(workdir, capsys):
    replay.verify_run(workdir)
    assert capsys.readouterr().out.splitlines() == [
        "vqgan: the hashes of the checkpoints at steps 4 and 6 match.",
        "vqgan: steps 5 to 6 were repeated, and every array is that of the last checkpoint, bit "
        "for bit: it is what these settings and data produce.",
    ]


@pytest.mark.slow
def test_a_run_with_one_checkpoint_is_repeated_from_the_start(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints" / "vqgan" / "4")
    replay.verify_run(workdir)
    assert "steps 1 to 6 were repeated, and every array" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_that_the_settings_do_not_produce_is_refused(workdir):
    """The last checkpoint is replaced by one with right hashes but other arrays."""
    path = ("nets", "generator", "params", "decoder", "conv_in", "bias")
    bias = Store(workdir, "vqgan").read(6).arrays[path]
    message = "do not produce the checkpoint of step 6: "
    rewrite_last_checkpoint(workdir, {path: bias + np.float32(1e-3)})
    name = "the array nets.generator.params.decoder.conv_in.bias"
    with pytest.raises(RunFailed, match=f"{message}{name} differs by up to 0.001"):
        replay.verify_run(workdir)
    rewrite_last_checkpoint(workdir, {path: bias, ("nets", "other"): bias})
    with pytest.raises(RunFailed, match=f"{message}only the checkpoint has the array nets.other"):
        replay.verify_run(workdir)


def test_a_flipped_byte_of_a_checkpoint_is_named(workdir):
    folder = workdir / "checkpoints" / "vqgan" / "4" / "state"
    flip_byte(max(folder.rglob("*"), key=lambda x: x.stat().st_size if x.is_file() else 0))
    with pytest.raises(RunFailed, match=r"checkpoints/vqgan/4 is damaged"):
        replay.verify_run(workdir)


def test_a_single_changed_pixel_of_the_data_is_noticed(workdir, monkeypatch):
    make_splits = datasets.SOURCES["synthetic"]

    def change_pixel(config):
        splits = make_splits(config)
        images = splits.train.images.copy()
        images[-1, 0, 0] ^= 1
        return splits._replace(train=splits.train._replace(images=images))

    monkeypatch.setitem(datasets.SOURCES, "synthetic", change_pixel)
    with pytest.raises(RunFailed, match="at least one of the training images or labels is not"):
        replay.verify_run(workdir)


def rewrite_last_checkpoint(workdir, arrays=None, **changes):
    """Replaces the last checkpoint by one with other arrays or metadata, and right hashes."""
    store = Store(workdir, "vqgan", "reconstruction_loss")
    checkpoint = store.read(6)._replace(**changes)
    arrays = checkpoint.arrays | (arrays or {})
    forged = Store(
        workdir, "vqgan", "reconstruction_loss", checkpoint.dataset,
        environment=checkpoint.environment,
    )  # fmt: skip
    shutil.rmtree(store.path / "6")
    nets = traverse_util.unflatten_dict(arrays)
    forged.save(6, nets, checkpoint.config, None, first_step=checkpoint.first_step)
    forged.wait()


@pytest.mark.slow
def test_on_another_machine_the_metrics_of_one_step_are_compared(workdir, monkeypatch, capsys):
    cores = distributed.count_cores()
    monkeypatch.setattr(distributed, "count_cores", lambda: cores + 1)
    replay.verify_run(workdir)
    reason = f"the number of cores differs ({cores + 1}, not {cores})."
    assert (
        "vqgan: step 5 was repeated, and its metrics agree with those of the run up to rounding. "
        f"The last checkpoint was not compared bit for bit, since {reason}"
    ) in capsys.readouterr().out
    saved = Store(workdir, "vqgan").read(6).first_step
    rewrite_last_checkpoint(workdir, first_step=saved | {"l1": saved["l1"] * 1.01})
    with pytest.raises(RunFailed, match="do not produce step 5: l1 is"):
        replay.verify_run(workdir)
    stage = small_runs.build_vqgan_stage(small_runs.make_config(None))
    with pytest.raises(RunFailed, match="do not produce step 5: another is nan, not 1"):
        replay.compare_metrics(stage, saved, saved | {"another": 1.0})
    rewrite_last_checkpoint(workdir, first_step=None)
    replay.verify_run(workdir)
    assert f"since the metrics of step 5 were not saved, and {reason}" in capsys.readouterr().out


@pytest.mark.slow
def test_metrics_of_the_first_step_after_a_checkpoint_are_saved(workdir):
    """Also in a session that resumes, and if a line of the log covers several steps."""
    first = Store(workdir, "vqgan").read(6).first_step
    assert first["step"] == 5 and first["skipped"] == 0
    small_runs.train(workdir, **SETTINGS | {"vqgan__steps": 7, "vqgan__log_every": 1})
    resumed = Store(workdir, "vqgan").read(7).first_step
    row = small_runs.read_rows(workdir)[-2]
    assert row["step"] == resumed["step"] == 7
    assert {name: row[name] for name in resumed} == resumed


def test_changed_settings_are_refused(workdir):
    file = workdir / "config.json"
    config = json.loads(file.read_text())
    config["vqgan"]["learning_rate"] *= 2
    file.write_text(json.dumps(config))
    with pytest.raises(RunFailed, match="config.json differs from the checkpoints: --vqgan.learn"):
        replay.verify_run(workdir)


@pytest.mark.slow
def test_the_best_checkpoint_is_named_if_it_is_not_repeated(trained, tmp_path, capsys):
    """The validation after the last step is worse than the one before."""
    store = Store(trained, "vqgan", "reconstruction_loss")
    shutil.copytree(trained, tmp_path / "run")
    other = Store(tmp_path / "run", "vqgan", "reconstruction_loss")
    shutil.rmtree(other.path / "4")
    checkpoint = store.read(4)
    arrays = traverse_util.unflatten_dict(checkpoint.arrays)
    other.save(4, arrays, checkpoint.config, {"reconstruction_loss": 0.0})
    other.wait()
    replay.verify_run(tmp_path / "run")
    message = "sampling uses the best checkpoint, that of step 4, whose steps were not repeated"
    assert message in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_resumed_on_other_devices_is_repeated_on_as_many(workdir, monkeypatch, capsys):
    small_runs.train(workdir, **SETTINGS | {"vqgan__steps": 8, "devices": 2})
    replay.verify_run(workdir)
    assert "steps 7 to 8 were repeated, and every array" in capsys.readouterr().out
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    replay.verify_run(workdir)
    assert "step 7 was repeated, and its metrics" in (out := capsys.readouterr().out)
    assert "bit for bit, since the number of devices differs (1, not 2)." in out


@pytest.fixture
def prior_run(workdir):
    """A copy of the run with a prior."""
    settings = {"prior__steps": 4, "prior__checkpoint_every": 2, "prior__log_every": 2}
    small_runs.train(workdir, "prior", **settings)
    return workdir


def test_a_prior_is_verified_with_its_generator_and_tokens(prior_run, capsys):
    replay.verify_run(prior_run)
    out = capsys.readouterr().out
    assert "prior: the hashes of the checkpoints at steps 2 and 4 match." in out
    assert "prior: steps 3 to 4 were repeated, and every array" in out
    for pattern, message in (
        ("tokens/*/train/*.npz", r"tokens/.*npz is damaged. Delete it"),
        ("checkpoints/prior/frozen/*.npz", "npz is damaged; it is the generator"),
    ):
        file = next(prior_run.glob(pattern))
        before = file.read_bytes()
        flip_byte(file)
        with pytest.raises(RunFailed, match=message):
            replay.verify_run(prior_run)
        file.write_bytes(before)


@pytest.mark.slow
def test_a_prior_may_have_another_seed(workdir):
    small_runs.train(workdir, "prior", prior__steps=2, seed=3)
    replay.verify_run(workdir)
    config = json.loads((workdir / "config.json").read_text())
    assert config["seed"] == 3
    (workdir / "config.json").write_text(json.dumps(config | {"seed": 4}))
    with pytest.raises(RunFailed, match="--seed is 4, not 3"):
        replay.verify_run(workdir)


@pytest.mark.slow
def test_a_deterministic_run_can_be_verified(tmp_path):
    """Reading checkpoints starts JAX, which must have its flags by then."""
    settings = ["--config", "mnist_tiny", "--data.name", "synthetic", "--data.image-size", 8]
    settings += ["--vqgan.steps", 2, "--vqgan.channels", 4, "--vqgan.multipliers", 1]
    settings += ["--vqgan.batch-size", 8, "--deterministic", "--workdir", tmp_path / "run"]
    status, _, err = commands.run("train_vqgan.py", *settings, "--vqgan.discriminator-start", 1)
    assert status == 0, err
    status, out, err = commands.run("taming_jax/cli/__main__.py", "verify", tmp_path / "run")
    assert status == 0 and "every array is that of the last checkpoint" in out, err


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints; name the folder of a run"):
        replay.verify_run(tmp_path)
