"""Runs that begin from weights."""

import shutil

import jax
import numpy as np
import pytest

import taming_jax
from taming_jax.errors import UserError
from taming_jax.training.checkpoints import Store
from taming_jax.training.prior import PriorStage
from taming_jax.training.state import Net, TrainState
from taming_jax.training.vqgan import VQGANStage
from taming_jax.training.weights import (
    describe_loaded,
    describe_mismatches,
    load_matching_weights,
)
from tests import commands
from tests.conftest import TINY


def state(shape=(2, 3), ema=None):
    """A state of two networks, all of it zeros."""
    weights = {"layer": {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(3, np.float32)}}
    stats = {"batch_stats": {"mean": np.zeros(3, np.float32)}}
    moments = jax.tree.map(np.zeros_like, weights)
    return TrainState(
        np.zeros((), np.int32),
        {"generator": Net(weights, moments, ema=ema and jax.tree.map(np.copy, weights)),
         "discriminator": Net(weights, moments, stats)},
        np.zeros((), np.int32),
    )  # fmt: skip


def arrays():
    names = {
        ("nets", "generator", "params", "layer", "kernel"): (2, 3),
        ("nets", "generator", "params", "layer", "bias"): (3,),
        ("nets", "generator", "ema", "layer", "kernel"): (2, 3),
        ("nets", "discriminator", "params", "layer", "bias"): (3,),
        ("nets", "discriminator", "extra", "batch_stats", "mean"): (3,),
        ("nets", "generator", "opt_state", "layer", "bias"): (3,),
        ("step",): (),
    }
    return {name: np.full(shape, i + 1.0) for i, (name, shape) in enumerate(names.items())}


def test_weights_of_the_same_names_and_shapes_are_kept():
    begun = load_matching_weights(VQGANStage.learned, state(ema=True), arrays())
    generator, discriminator = (begun.state.nets[name] for name in ("generator", "discriminator"))
    for params in (generator.params, generator.ema):  # both begin as the average
        assert (params["layer"]["kernel"] == 3).all() and (params["layer"]["bias"] == 2).all()
    assert generator.params["layer"]["kernel"] is not generator.ema["layer"]["kernel"]
    assert (discriminator.params["layer"]["bias"] == 4).all()
    assert (discriminator.extra["batch_stats"]["mean"] == 5).all()
    assert not generator.opt_state["layer"]["bias"].any() and begun.state.step == 0
    assert begun.random == [("nets", "discriminator", "params", "layer", "kernel")]
    sentence = describe_loaded(begun, "runs/it")
    assert sentence == (
        "Starting from runs/it: loaded discriminator.layer 1, generator.layer 2; "
        "new: discriminator.layer 1."
    )


def test_other_shapes_are_new_and_nothing_kept_is_refused():
    begun = load_matching_weights(VQGANStage.learned, state(shape=(5, 3)), arrays())
    kernel = begun.state.nets["generator"].params["layer"]["kernel"]
    assert len(begun.random) == 2 and not kernel.any()
    # A prior's generator is its own.
    begun = load_matching_weights(PriorStage.learned, state(), arrays())
    assert not begun.state.nets["generator"].params["layer"]["kernel"].any()
    with pytest.raises(UserError, match="no weight in runs/it matches"):
        describe_loaded(begun, "runs/it")


@pytest.mark.parametrize(
    "script", [pytest.param("train_vqgan.py", marks=pytest.mark.slow), "train_prior.py"]
)
def test_a_run_begins_from_anothers_weights(script, both, stage1, tmp_path):
    workdir = tmp_path / "run"
    stage = script.removeprefix("train_").removesuffix(".py")
    if stage == "prior":
        shutil.copytree(stage1, workdir)
        line = ["--config", "mnist_tiny", "--prior.batch-size", 8, "--prior.layers", 1]
    else:
        line = [*TINY[:-1], "--vqgan.discriminator-filters", 8]
    line += [f"--{stage}.steps", 1, f"--{stage}.learning-rate", 1e-12]
    line += ["--devices", 1, f"--{stage}.init-from", both, "--workdir", workdir]
    status, out, err = commands.run_here(script, *line, draw=False)
    assert status == 0, err
    assert f"Starting from {both}: loaded" in out
    assert ("new: discriminator.conv_0" in out) == (stage == "vqgan")
    assert "the codes of another stage 1" not in out
    name = "generator" if stage == "vqgan" else "transformer"
    before, after = (Store(folder, stage).load_best() for folder in (both, workdir))
    kept = 0
    for path, array in after.arrays.items():
        if path[:3] == ("nets", name, "params"):
            better = before.arrays.get(("nets", name, "ema", *path[3:]))
            expected = before.arrays[path] if better is None else better
            np.testing.assert_allclose(array, expected, atol=1e-9)
            kept += 1
    assert kept > 5
    # The same command again resumes, though the source is gone.
    status, out, err = commands.run_here(script, *line, "--no-compile-cache", draw=False)
    assert status == 0 and "is already trained" in out, err
    elsewhere = [x if x != both else tmp_path / "none" for x in line]
    elsewhere[-1] = tmp_path / "other"
    if stage == "vqgan":
        status, _, err = commands.run_here(script, *elsewhere, draw=False)
        assert status == 2 and "none holds no vqgan checkpoint" in err, err


@pytest.mark.slow
def test_an_imported_run_goes_on(both, tmp_path):
    """Weights alone, as an import leaves them: each stage trains on, and begins as they are."""
    from taming_jax.interop.imports import Model, write_run
    from taming_jax.weights.layout import flatten_shapes

    trained = taming_jax.load_run(both)
    config = trained.config
    unknown = taming_jax.load_config(both / "config.json", {"data.name": "unknown"})
    networks = {
        "generator": jax.tree.map(np.asarray, trained.params),
        "transformer": jax.tree.map(np.asarray, trained.transformer),
    }
    workdir = tmp_path / "run"
    write_run(workdir, Model(unknown, trained.class_names), networks)
    assert flatten_shapes(networks["generator"])
    run = taming_jax.load_run(workdir)
    assert run.class_names == trained.class_names and run.step == 0
    images = trained.sample([0, 1], seed=4, devices=1)
    np.testing.assert_array_equal(run.sample([0, 1], seed=4, devices=1), images)
    line = ["--config", workdir / "config.json", "--workdir", workdir]
    status, _, err = commands.run_here("train_vqgan.py", *line, draw=False)
    assert status == 2 and "the dataset of this imported run is not known" in err, err
    line += ["--data.name", config.data.name]
    status, out, err = commands.run_here("train_vqgan.py", *line, "--vqgan.steps", 1, draw=False)
    assert status == 0 and "Starting from" in out and "new: discriminator.conv_0" in out, err
    status, out, err = commands.run_here("train_prior.py", *line, "--prior.steps", 1, draw=False)
    assert status == 0 and "; nothing is new." in out, err
    assert taming_jax.load_config(workdir / "config.json").data.name == config.data.name
    # Anew is from the imported weights, which no setting can delete.
    first = workdir / "checkpoints" / "prior" / "0"
    again = ("train_prior.py", *line, "--prior.steps", 1, "--restart")
    status, out, err = commands.run_here(*again, draw=False)
    assert status == 0 and "Starting from" in out and first.is_dir(), err
    status, out, err = commands.run_here(*again, "--prior.dropout", 0.3, draw=False)
    assert status == 0 and "Starting from" not in out and not first.is_dir(), err
    assert (workdir / "checkpoints" / "prior-weights-only" / "0").is_dir()
    status, _, err = commands.run_here(*again, "--prior.init-from", tmp_path / "none", draw=False)
    assert status == 2 and "none holds no prior checkpoint" in err, err
    assert taming_jax.load_run(workdir).step == 1


def test_weights_that_mean_something_else_are_named(both):
    """As another number of heads, or another stage 1, makes them."""
    checkpoint = Store(both, "prior").load_best()
    config = checkpoint.config
    other = taming_jax.load_config(both / "config.json", {"prior.heads": 2})
    nets = checkpoint.nets
    template = TrainState(np.zeros(()), {
        name: Net(jax.tree.map(np.copy, net["params"]), ()) for name, net in nets.items()
    })  # fmt: skip
    arguments = (config, template, other, checkpoint.arrays)
    assert describe_mismatches(("transformer",), *arguments) == [
        "--prior.heads is 4, not 2 as in the run that the weights come from."
    ]
    template.nets["generator"].params["quant_conv"]["bias"][0] += 1
    assert "another stage 1" in describe_mismatches(("transformer",), *arguments)[1]
    assert describe_mismatches(("generator", "discriminator"), *arguments) == []
