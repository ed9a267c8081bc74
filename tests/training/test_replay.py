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
from tests import small_runs

SETTINGS = {
    "vqgan__steps": 6, "vqgan__checkpoint_every": 2, "vqgan__log_every": 2, "vqgan__eval_every": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of stage 1 with checkpoints of steps 4 and 6."""
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
        "vqgan: the hashes of the checkpoints of steps 4 and 6 match.",
        "vqgan: steps 5 to 6 were repeated, and every array is that of the last checkpoint, bit "
        "for bit: it is what these settings and data produce.",
    ]


def test_a_run_with_one_checkpoint_is_repeated_from_the_start(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints" / "vqgan" / "4")
    replay.verify_run(workdir)
    assert "steps 1 to 6 were repeated, and every array" in capsys.readouterr().out


def test_a_checkpoint_that_the_settings_do_not_produce_is_refused(workdir):
    """The last checkpoint is replaced by one with right hashes but another array."""
    store = Store(workdir, "vqgan", "reconstruction_loss")
    checkpoint = store.read(6)
    path = ("nets", "generator", "params", "decoder", "conv_in", "bias")
    arrays = dict(checkpoint.arrays)
    arrays[path] = arrays[path] + np.float32(1e-3)
    forged = Store(workdir, "vqgan", "reconstruction_loss", checkpoint.dataset)
    forged._environment = checkpoint.environment
    shutil.rmtree(store.path / "6")
    forged.save(6, traverse_util.unflatten_dict(arrays), checkpoint.config, None)
    forged.wait()
    message = r"do not produce the checkpoint of step 6: the array nets.generator.params.decoder."
    with pytest.raises(RunFailed, match=message + r"conv_in.bias differs by up to 0.001"):
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


def test_on_another_machine_the_metrics_of_the_log_are_compared(workdir, monkeypatch, capsys):
    cores = distributed.count_cores()
    monkeypatch.setattr(distributed, "count_cores", lambda: cores + 1)
    replay.verify_run(workdir)
    assert (
        "vqgan: steps 5 to 6 were repeated, and the metrics agree with the log up to rounding. The "
        f"state was not compared bit for bit: cores {cores + 1} here, {cores} in the run."
    ) in capsys.readouterr().out
    log = workdir / "metrics" / "vqgan.jsonl"
    rows = small_runs.read_rows(workdir)
    changed = next(row for row in rows if row["split"] == "train" and row["step"] == 6)
    honest = dict(changed)
    changed["l1"] *= 1.01
    log.write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(RunFailed, match="do not produce the log of step 6: l1 is"):
        replay.verify_run(workdir)
    rows[rows.index(changed)] = {name: honest[name] for name in ("step", "split", "epoch")}
    log.write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(RunFailed, match="has none of the metrics of these steps"):
        replay.verify_run(workdir)
    rows[-2:] = []
    log.write_text("\n".join(map(json.dumps, rows)) + "\n")
    replay.verify_run(workdir)
    assert "no line within 20 steps of step 4, and cores" in capsys.readouterr().out


def test_changed_settings_are_refused(workdir):
    file = workdir / "config.json"
    config = json.loads(file.read_text())
    config["vqgan"]["learning_rate"] *= 2
    file.write_text(json.dumps(config))
    with pytest.raises(RunFailed, match="config.json differs from the checkpoints: --vqgan.learn"):
        replay.verify_run(workdir)


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
    assert "steps 7 to 8 were repeated, and the metrics" in (out := capsys.readouterr().out)
    assert "bit for bit: devices 1 here, 2 in the run." in out


@pytest.fixture
def prior_run(workdir):
    """A copy of the run with a prior."""
    settings = {"prior__steps": 4, "prior__checkpoint_every": 2, "prior__log_every": 2}
    small_runs.train(workdir, "prior", **settings)
    return workdir


def test_a_prior_is_verified_with_its_generator_and_tokens(prior_run, capsys):
    replay.verify_run(prior_run)
    out = capsys.readouterr().out
    assert "prior: the hashes of the checkpoints of steps 2 and 4 match." in out
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


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints; name the folder of a run"):
        replay.verify_run(tmp_path)
