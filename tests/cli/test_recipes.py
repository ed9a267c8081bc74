"""Tests the command that fills the tables of docs/recipes.md, with small rows."""

import sys

import pytest

from taming_jax.cli import recipes
from taming_jax.cli.recipes import Row, Table

SMALL = {
    "vqgan.steps": 2, "vqgan.batch_size": 4, "vqgan.channels": 4, "vqgan.latent_channels": 4,
    "vqgan.discriminator_filters": 4, "prior.layers": 1, "prior.width": 8, "prior.steps": 2,
    "prior.batch_size": 4, "data.name": "synthetic", "data.image_size": 16,
}  # fmt: skip


@pytest.mark.slow
def test_rows_train_stage_1_or_a_prior_or_change_only_the_sampling(tmp_path, monkeypatch, capsys):
    rows = {
        "small": Row(SMALL),
        "prior": Row({"prior.steps": 3}, "small"),
        "guidance": Row({"guidance_scale": 1.0}, "prior"),
    }
    monkeypatch.setitem(recipes.TABLES, "mnist_tiny", Table(rows, 4, 4))
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--workdir", str(tmp_path)])
    recipes.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0] for line in lines if "---" not in line]
    assert names == ["| row", "| small", "| row", "| prior", "| guidance"]
    assert "`--vqgan.steps 2 " in lines[2] and "| `--prior.steps 3` |" in lines[-2]
    # The second call prints the same measurements without training.
    monkeypatch.setattr(recipes, "train", None)
    recipes.main()
    repeated_lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")
    ]
    assert repeated_lines == lines
