import json
import sys

import jax
import numpy as np
import pytest

from taming_jax.cli import compare, verify
from taming_jax.errors import RunFailed, UserError
from taming_jax.evaluation.comparison import read_runs
from taming_jax.models.quantizers import entropy
from taming_jax.run import load_run
from tests import small_runs

SMALL = {
    "vqgan.batch_size": 4, "vqgan.channels": 4, "vqgan.latent_channels": 4,
    "vqgan.discriminator_filters": 4, "vqgan.checkpoint_every": 1, "prior.layers": 1,
    "prior.width": 8, "prior.batch_size": 4, "data.name": "synthetic", "data.image_size": 16,
}  # fmt: skip
SETTINGS = [
    word for name, value in SMALL.items()
    for word in (f"--{name.replace('_', '-')}", str(value))
]  # fmt: skip


@pytest.fixture
def run_compare(tmp_path, monkeypatch, capsys):
    """Returns a function that compares in a folder and returns the lines of the printed page."""

    def run(*arguments):
        argv = ["--workdir", str(tmp_path), "--images", "8", "--samples", "8", *arguments]
        monkeypatch.setattr(sys, "argv", ["compare", *argv, *SETTINGS])
        capsys.readouterr()
        compare.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.slow
def test_runs_are_trained_once_and_added_to_the_page(run_compare, tmp_path, capsys):
    first = run_compare("--quantizers", "fsq", "--priors", "--steps", "2")
    assert (tmp_path / "fsq" / "seed-0" / "config.json").exists()
    trained = (tmp_path / "fsq" / "seed-0" / "result.json").read_bytes()
    row = "vq --vqgan.vq.restart-after 1"
    both = run_compare("--quantizers", row, "--priors", "--steps", "2")
    assert next(line for line in first if line.startswith("| fsq |")) in both
    assert any(line.startswith(f"| {row} | 128 | ") for line in both)
    assert (tmp_path / "comparison.md").read_text().splitlines() == both
    assert (tmp_path / "fsq" / "seed-0" / "result.json").read_bytes() == trained
    values = json.loads(trained)
    assert values["bits_per_image"] == 7 * 16  # 4 x 4 codes of 7 bits
    log = small_runs.read_rows(tmp_path / "fsq" / "seed-0")
    usage = [[x["step"], x["usage"]] for x in log if x["split"] == "validation"]
    assert values["usage_by_step"] == usage != []
    with pytest.raises(UserError, match="were made with steps 2, not 3. Use the same value"):
        run_compare("--quantizers", "ibq", "--steps", "3")


@pytest.mark.slow
def test_priors_of_two_seeds_are_compared_and_verified(run_compare, tmp_path, monkeypatch, capsys):
    arguments = (
        "--priors", "masked", "random-order", "--steps", "2", "--prior-steps", "2", "--seeds", "2",
    )  # fmt: skip
    page = run_compare(*arguments)
    (masked,) = (line for line in page if line.startswith("| vq | masked |"))
    cells = masked.split(" | ")
    assert "±" in cells[2] and cells[6] == "–", "a masked prior has no likelihood"
    names = {"rate.png", "speed.png", "usage.png", "samples.png", "reconstructions.png"}
    assert names <= {file.name for file in tmp_path.iterdir()}
    runs = read_runs(tmp_path / "comparison.md")
    assert len(runs) == 6
    for folder, expected in runs:
        assert load_run(folder).hash_weights() == expected
    # Both priors of a seed are trained on the same generator.
    generators = [load_run(tmp_path / x / "seed-1").params for x in ("vq-masked", "vq")]
    jax.tree.map(np.testing.assert_array_equal, *generators)
    assert run_compare(*arguments) == page, "nothing is trained or measured again"

    monkeypatch.setattr(sys, "argv", ["verify", str(tmp_path / "comparison.md")])
    verify.main()
    assert capsys.readouterr().out.count("bit for bit") == 6
    page_file = tmp_path / "comparison.md"
    folder, value = runs[0]
    for file in (page_file, folder / "result.json"):
        file.write_text(file.read_text().replace(value, "0" * 16))
    with pytest.raises(RunFailed, match=f"these runs could not be verified: {folder}\\."):
        verify.main()


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(run_compare, tmp_path, monkeypatch, capsys):
    failing = "ibq --vqgan.ibq.entropy-weight 1"
    monkeypatch.setattr(entropy, "MAX_BYTES", 100)
    arguments = "--priors", "masked", "--steps", "2", "--prior-steps", "2"
    with pytest.raises(
        RunFailed, match=f"these rows failed: {failing}, seed 0; masked on {failing}"
    ):
        run_compare("--quantizers", failing, "fsq", *arguments)
    message = capsys.readouterr().err
    assert f"'{failing}, seed 0' failed: the entropy penalty of the quantizer ibq needs" in message
    assert f"'masked on {failing}, seed 0' failed: there is no stage 1 to train it on" in message
    assert "| fsq | masked |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    "flag, row, message",
    [
        ("quantizers", "simvk", "row 'simvk': there is no quantizer 'simvk' .did you mean 'simvq'"),
        ("quantizers", "fsq --vqgan.ema.decay 0.5", "decay is a setting of the quantizer ema"),
        ("quantizers", "vq --vqgan.quantizer fsq", "--vqgan.quantizer must be the same for all"),
        ("quantizers", "vq --vqgan.steps=9", "--vqgan.steps must be the same for all rows"),
        ("quantizers", "vq --seed 3", "--seed must be the same for all rows"),
        ("quantizers", "vq --data.image-size 32", "--data.image-size must be the same for all"),
        ("quantizers", "vq '", "in the row 'vq '': No closing quotation"),
        ("priors", "mask", "in the row 'mask on vq': there is no prior 'mask'"),
        ("priors", "masked --vqgan.channels 8", "--vqgan.channels is not a setting of the prior"),
    ],
)
def test_wrong_rows_are_refused_before_any_is_trained(run_compare, tmp_path, flag, row, message):
    with pytest.raises(UserError, match=message):
        run_compare(f"--{flag}", row)
    assert not list(tmp_path.iterdir())


def test_a_comparison_needs_a_seed_and_a_folder_that_can_be_written(run_compare, tmp_path):
    with pytest.raises(UserError, match="--seeds is 0; it must be 1 or more"):
        run_compare("--seeds", "0")
    with pytest.raises(UserError, match="samples is 1; it must be 0, or 2 or more"):
        run_compare("--samples", "1")
    with pytest.raises(UserError, match="--samples is 0, but priors are evaluated on samples"):
        run_compare("--samples", "0")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir .*file cannot be written"):
        run_compare("--quantizers", "vq", "--priors", "--workdir", str(tmp_path / "file"))


def test_folders_are_named_after_rows():
    assert compare.name_folder("vq", "", 0) == "vq/seed-0"
    row = "vq --vqgan.vq.restart-after 1"
    assert compare.name_folder(row, "masked", 1) == "vq-vqgan.vq.restart-after-1-masked/seed-1"


def test_verify_names_what_it_cannot_verify(tmp_path, monkeypatch):
    page = tmp_path / "comparison.md"
    page.write_text("# A page\n\n| a | b |\n")
    for path, message in (
        (page, "has no complete table of runs"),
        (tmp_path / "none", "there is no .*none"),
    ):
        monkeypatch.setattr(sys, "argv", ["verify", str(path)])
        with pytest.raises(UserError, match=message):
            verify.main()
