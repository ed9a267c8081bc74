"""Runs the examples of docs/extending.md exactly as they are printed."""

import dataclasses
import re
import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from taming_jax.config.load import read_config, replace_section
from taming_jax.config.validation import validate_config
from taming_jax.data import datasets
from taming_jax.data.datasets import SOURCES
from taming_jax.models.quantizers import QUANTIZERS
from taming_jax.priors.registry import PRIORS
from taming_jax.run import load_run
from taming_jax.training import loop, vqgan, vqgan_step, writers
from taming_jax.training.prior import PriorStage
from taming_jax.training.writers import read_rows
from taming_jax.weights import layout
from tests import small_runs
from tests.commands import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(python|diff)\n(.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def restore_registries():
    """Removes after each test what an example has registered."""
    copies = [(registry, dict(registry)) for registry in (SOURCES, QUANTIZERS, PRIORS)]
    yield
    for registry, before in copies:
        registry.clear()
        registry.update(before)


def read_example(title: str, kind: str = "python") -> str:
    """Returns the code of a section of the page."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return next(code for language, code in BLOCK.findall(section) if language == kind)


def run_example(title: str) -> dict:
    names: dict = {}
    exec(compile(read_example(title), f"docs/extending.md, {title}", "exec"), names)
    return names


def apply_diff(source: str, title: str) -> str:
    """Returns a source file with the diff of a section applied. The context of the diff must
    match."""
    lines = read_example(title, "diff").splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert source.count(before) == 1, f"the diff of '{title}' does not fit"
    return source.replace(before, after)


def patch_module(module, title: str, names: dict):
    """Returns a module with the diff of a section applied, and with the names that its example
    defines."""
    patched = types.ModuleType(module.__name__)
    patched.__dict__.update(names)
    path = ROOT / f"{module.__name__.replace('.', '/')}.py"
    exec(compile(apply_diff(path.read_text(), title), str(path), "exec"), patched.__dict__)
    return patched


def test_the_preset_is_a_valid_config_with_its_own_name():
    run_example("A dataset")
    config = run_example("A preset")["CONFIG"]
    assert validate_config(config).config == "stripes" and config.vqgan.codebook_size == 64
    assert datasets.load(config.data).train.images.shape[1:] == (32, 32, 3)


def test_the_sign_quantizer_looks_up_its_own_codes():
    quantizer_type = run_example("A quantizer")["SignQuantizer"]
    settings = dataclasses.replace(small_runs.make_config(None).vqgan, code_dim=4)
    quantizer = quantizer_type(settings)
    z = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    quantized = quantizer.apply({}, z)
    vectors = quantizer.apply({}, quantized.indices, method="lookup")
    np.testing.assert_array_equal(vectors, quantized.vectors)
    assert quantized.indices.max() < quantizer.num_codes == 16


@pytest.mark.slow
def test_the_dataset_quantizer_loss_and_log_destination_work_together(tmp_path, monkeypatch):
    run_example("A dataset")
    run_example("A quantizer")
    loss_names = run_example("A loss term and a metric")
    monkeypatch.setattr(
        vqgan_step.losses, "total_variation", loss_names["total_variation"], raising=False
    )
    patched_step = patch_module(vqgan_step, "A loss term and a metric", {})
    monkeypatch.setattr(vqgan, "VQGANObjective", patched_step.VQGANObjective)
    patched_writers = patch_module(writers, "A log destination", run_example("A log destination"))
    for name in ("open_writers", "check_destinations"):
        monkeypatch.setattr(loop, name, getattr(patched_writers, name))
    config = small_runs.make_config(tmp_path / "run", data__name="stripes", vqgan__steps=3)
    config = replace_section(config, "vqgan", quantizer="sign", code_dim=4, codebook_size=16)
    config = dataclasses.replace(config, log=("tensorboard", "csv"))
    loop.train(vqgan.VQGANStage, config)
    rows = read_rows(tmp_path / "run" / "metrics" / "vqgan.jsonl")
    train_rows = [row for row in rows if row["split"] == "train"]
    assert len(train_rows) == 3 and all(row["total_variation"] > 0 for row in train_rows)
    for row in train_rows:
        total = row["l1"] * 2 + 0.1 * row["total_variation"]
        assert row["reconstruction_loss"] == pytest.approx(total, rel=1e-5)
    table = (tmp_path / "run" / "csv" / "vqgan_train.csv").read_text()
    assert table.count("total_variation") == 3 and "1,total_variation," in table


def test_the_independent_prior_can_be_trained(vqgan_workdir, tmp_path):
    run_example("A prior")
    shutil.copytree(vqgan_workdir, tmp_path / "run")
    config = read_config(tmp_path / "run" / "config.json")
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    settings = {"steps": 5, "batch_size": 8, "label_dropout": 0.0, "guidance_scale": None}
    config = replace_section(config, "prior", kind="independent", **settings)
    loop.train(PriorStage, config)
    rows = read_rows(tmp_path / "run" / "metrics" / "prior.jsonl")
    nll = [row["nll"] for row in rows if row["split"] == "train"]
    assert (
        nll[0] == pytest.approx(np.log(config.vqgan.codebook_size), rel=1e-5) and nll[-1] < nll[0]
    )


def test_a_checkpoint_of_another_project_can_be_imported(vqgan_workdir, tmp_path):
    names = run_example("A checkpoint format")
    run = load_run(vqgan_workdir)
    params = jax.tree.map(np.asarray, run.params)
    arrays = layout.convert_to_torch(names["build_layout"](layout.flatten_shapes(params)), params)
    assert "G/encoder/conv_in.weight" in arrays
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    save_file(arrays, tmp_path / "g.safetensors")
    names["import_mine"](tmp_path / "g.safetensors", tmp_path / "run", run.config)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)
    imported = load_run(tmp_path / "run")
    np.testing.assert_array_equal(imported.encode(images), run.encode(images))
