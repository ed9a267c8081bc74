"""The command `taming-jax` and its subcommands."""

import sys

import numpy as np
import pytest

import taming_jax
from taming_jax.cli.__main__ import COMMANDS, main


@pytest.fixture
def call(capsys, monkeypatch):
    """Returns a function that runs the command in this process and returns its exit status, stdout,
    and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["taming-jax", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as exit:  # argparse and tyro raise it for flags
            status = exit.code
        return status, *capsys.readouterr()

    return call


def test_the_command_without_arguments_lists_its_subcommands(call):
    for arguments in ([], ["--help"]):
        status, out, _ = call(*arguments)
        assert status == 0 and all(f"  {name} " in out for name in COMMANDS)
    status, out, _ = call("import", "--help")
    assert status == 0 and "import compvis" in out and "export" not in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_shows_its_settings(call, name):
    status, out, err = call(*name.split(), "--help")
    assert status == 0 and "--" in out, err


def test_unknown_subcommands_are_reported_in_one_line(call):
    status, _, err = call("smaple", "--workdir", "x")
    assert status == 2 and "did you mean 'sample'?" in err and err.count("\n") == 1
    status, _, err = call("import", "--checkpoint", "x")
    assert status == 2 and err.count("\n") == 1


def test_encode_writes_the_codes_of_a_split(call, prior_workdir, tmp_path):
    out = tmp_path / "codes.npz"
    status, output, err = call(
        "encode", "--workdir", prior_workdir, "--split", "test", "--out", out
    )
    assert status == 0 and str(out) in output, err
    split = taming_jax.load_run(prior_workdir).tokens("test")
    written = np.load(out)
    codes = written["codes"]
    assert codes.ndim == 3
    np.testing.assert_array_equal(codes.reshape(len(codes), -1), split.images)
    np.testing.assert_array_equal(written["labels"], split.labels)
    status, _, err = call("encode", "--workdir", prior_workdir, "--out", tmp_path / "codes.txt")
    assert status == 2 and "name a .npz" in err


def test_the_help_of_complete_has_its_own_example(call):
    status, out, _ = call("complete", "--help")
    assert status == 0 and "taming-jax complete bird.jpg" in out
    assert "taming-jax sample --workdir" not in out


def test_complete_takes_pictures_without_a_flag(call, prior_workdir, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((16, 16), 90, np.uint8)).save(tmp_path / "one.png")
    settings = ("--workdir", prior_workdir, "--per-class", 1, "--devices", 1, "--classes", 0)
    outs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    status, _, err = call("complete", tmp_path / "one.png", *settings, "--out", outs[0])
    assert status == 0, err
    status, _, err = call("sample", "--complete", tmp_path / "one.png", *settings, "--out", outs[1])
    assert status == 0, err
    np.testing.assert_array_equal(*(np.load(out)["images"] for out in outs))
