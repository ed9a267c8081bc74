import json
import sys

import pytest

from taming_jax.cli import compare
from taming_jax.errors import RunFailed, UserError
from taming_jax.models.quantizers import entropy
from tests import small_runs
from tests.cli.test_recipes import SMALL

SETTINGS = [
    word for name, value in SMALL.items()
    if name.startswith(("vqgan", "data")) and name != "vqgan.steps"
    for word in (f"--{name.replace('_', '-')}", str(value))
]  # fmt: skip


@pytest.fixture
def run_compare(tmp_path, monkeypatch, capsys):
    """Returns a function that compares quantizers in a folder and returns the printed table."""

    def run(*arguments):
        argv = ["compare", "--workdir", str(tmp_path), "--images", "4", *arguments, *SETTINGS]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        compare.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.slow
def test_rows_are_trained_once_and_added_to_the_table(run_compare, tmp_path, monkeypatch):
    first = run_compare("--quantizers", "fsq", "--steps", "2")
    assert (tmp_path / "fsq" / "config.json").exists() and len(first) == 3
    trained = (tmp_path / "fsq" / "result.json").read_bytes()
    row = "vq --vqgan.vq.restart-after 1"
    both = run_compare("--quantizers", row, "--steps", "2")
    assert both[3] == first[2] and both[2].startswith(f"| {row} | 128 | ")
    assert (tmp_path / "comparison.md").read_text().splitlines() == both
    assert (tmp_path / "usage.png").stat().st_size > 1000
    assert (tmp_path / "fsq" / "result.json").read_bytes() == trained
    values = json.loads(trained)
    assert values["bits per image"] == 7 * 16  # 4 x 4 codes of 7 bits
    log = small_runs.read_rows(tmp_path / "fsq")
    usage = [[x["step"], x["usage"]] for x in log if x["split"] == "validation"]
    assert values["usage_by_step"] == usage != []
    with pytest.raises(UserError, match="were made with steps 2, not 3. Use the same value"):
        run_compare("--quantizers", "ibq", "--steps", "3")


@pytest.mark.slow
def test_a_row_that_fails_does_not_stop_the_others(run_compare, tmp_path, monkeypatch, capsys):
    failing = "ibq --vqgan.ibq.entropy-weight 1"
    monkeypatch.setattr(entropy, "MAX_BYTES", 100)
    with pytest.raises(RunFailed, match=f"these rows failed: {failing}. The others are in the"):
        run_compare("--quantizers", failing, "fsq", "--steps", "2")
    message = capsys.readouterr().err
    assert f"The row '{failing}' failed: the entropy penalty of the quantizer ibq needs" in message
    assert "| fsq | 128 |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    "row, message",
    [
        ("simvk", "in the row 'simvk': there is no quantizer 'simvk' .did you mean 'simvq'"),
        ("fsq --vqgan.ema.decay 0.5", "--vqgan.ema.decay is a setting of the quantizer ema"),
        ("vq --vqgan.quantizer fsq", "--vqgan.quantizer must be the same for all rows"),
        ("vq --vqgan.steps=9", "--vqgan.steps must be the same for all rows"),
        ("vq '", "in the row 'vq '': No closing quotation"),
    ],
)
def test_wrong_rows_are_refused_before_any_is_trained(run_compare, tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        run_compare("--quantizers", row)
    assert not list(tmp_path.iterdir())


def test_a_comparison_needs_rows_and_a_folder_that_can_be_written(run_compare, tmp_path):
    with pytest.raises(UserError, match="needs at least one row"):
        run_compare("--quantizers")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir .*file cannot be written"):
        run_compare("--quantizers", "vq", "--workdir", str(tmp_path / "file"))


def test_folders_are_named_after_rows():
    assert compare.name_folder("vq") == "vq"
    assert compare.name_folder("vq --vqgan.vq.restart-after 1") == "vq-vqgan.vq.restart-after-1"
