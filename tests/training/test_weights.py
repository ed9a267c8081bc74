"""Tests of runs that start from existing weights."""

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


def make_state(shape=(2, 3), ema=None):
    """Returns a state of two networks in which all arrays are zero."""
    weights = {"layer": {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(3, np.float32)}}
    stats = {"batch_stats": {"mean": np.zeros(3, np.float32)}}
    moments = jax.tree.map(np.zeros_like, weights)
    return TrainState(
        np.zeros((), np.int32),
        {"generator": Net(weights, moments, ema=ema and jax.tree.map(np.copy, weights)),
         "discriminator": Net(weights, moments, stats)},
        np.zeros((), np.int32),
    )  # fmt: skip


def make_arrays():
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


def test_weights_with_the_same_names_and_shapes_are_loaded():
    loaded = load_matching_weights(VQGANStage.learned, make_state(ema=True), make_arrays())
    generator, discriminator = (loaded.state.nets[name] for name in ("generator", "discriminator"))
    for params in (generator.params, generator.ema):  # both start from the EMA
        assert (params["layer"]["kernel"] == 3).all() and (params["layer"]["bias"] == 2).all()
    assert generator.params["layer"]["kernel"] is not generator.ema["layer"]["kernel"]
    assert (discriminator.params["layer"]["bias"] == 4).all()
    assert (discriminator.extra["batch_stats"]["mean"] == 5).all()
    assert not generator.opt_state["layer"]["bias"].any() and loaded.state.step == 0
    assert loaded.random == [("nets", "discriminator", "params", "layer", "kernel")]
    message = describe_loaded(loaded, "runs/it")
    assert message == (
        "Starting from runs/it. Arrays loaded: discriminator.layer 1, generator.layer 2; "
        "initialized at random: discriminator.layer 1."
    )


def test_weights_with_other_shapes_stay_new_and_a_source_without_any_match_is_refused():
    loaded = load_matching_weights(VQGANStage.learned, make_state(shape=(5, 3)), make_arrays())
    kernel = loaded.state.nets["generator"].params["layer"]["kernel"]
    assert len(loaded.random) == 2 and not kernel.any()
    # A prior does not load the generator, because it has its own.
    loaded = load_matching_weights(PriorStage.learned, make_state(), make_arrays())
    assert not loaded.state.nets["generator"].params["layer"]["kernel"].any()
    with pytest.raises(UserError, match="no weight in runs/it has the name and shape"):
        describe_loaded(loaded, "runs/it")


@pytest.mark.parametrize(
    "script", [pytest.param("train_vqgan.py", marks=pytest.mark.slow), "train_prior.py"]
)
def test_a_run_can_start_from_the_weights_of_another(
    script, prior_workdir, vqgan_workdir, tmp_path
):
    workdir = tmp_path / "run"
    stage = script.removeprefix("train_").removesuffix(".py")
    if stage == "prior":
        shutil.copytree(vqgan_workdir, workdir)
        command = ["--config", "mnist_tiny", "--prior.batch-size", 8, "--prior.layers", 1]
    else:
        command = [*TINY[:-1], "--vqgan.discriminator-filters", 8]
    command += [f"--{stage}.steps", 1, f"--{stage}.learning-rate", 1e-12]
    command += ["--devices", 1, f"--{stage}.init-from", prior_workdir, "--workdir", workdir]
    status, out, err = commands.run_here(script, *command, draw=False)
    assert status == 0, err
    assert f"Starting from {prior_workdir}. Arrays loaded" in out
    assert ("initialized at random: discriminator.conv_0" in out) == (stage == "vqgan")
    assert "the codes of another stage 1" not in out
    name = "generator" if stage == "vqgan" else "transformer"
    before, after = (Store(folder, stage).load_best() for folder in (prior_workdir, workdir))
    loaded_count = 0
    for path, array in after.arrays.items():
        if path[:3] == ("nets", name, "params"):
            ema = before.arrays.get(("nets", name, "ema", *path[3:]))
            expected = before.arrays[path] if ema is None else ema
            np.testing.assert_allclose(array, expected, atol=1e-9)
            loaded_count += 1
    assert loaded_count > 5
    # The same command resumes the run. It does not need the source again.
    status, out, err = commands.run_here(script, *command, "--no-compile-cache", draw=False)
    assert status == 0 and "is already trained" in out, err
    other_command = [x if x != prior_workdir else tmp_path / "none" for x in command]
    other_command[-1] = tmp_path / "other"
    if stage == "vqgan":
        status, _, err = commands.run_here(script, *other_command, draw=False)
        assert status == 2 and "none holds no vqgan checkpoint" in err, err


@pytest.mark.slow
def test_an_imported_run_can_be_trained(prior_workdir, tmp_path):
    """An import leaves only weights. Both stages start from them."""
    from taming_jax.interop.imports import Model, write_run
    from taming_jax.weights.layout import flatten_shapes

    trained = taming_jax.load_run(prior_workdir)
    config = trained.config
    unknown = taming_jax.load_config(prior_workdir / "config.json", {"data.name": "unknown"})
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
    flags = ["--config", workdir / "config.json", "--workdir", workdir]
    status, _, err = commands.run_here("train_vqgan.py", *flags, draw=False)
    assert status == 2 and "the dataset of this imported run is not known" in err, err
    flags += ["--data.name", config.data.name]
    status, out, err = commands.run_here("train_vqgan.py", *flags, "--vqgan.steps", 1, draw=False)
    assert (
        status == 0
        and "Starting from" in out
        and "initialized at random: discriminator.conv_0" in out
    ), err
    status, out, err = commands.run_here("train_prior.py", *flags, "--prior.steps", 1, draw=False)
    assert status == 0 and "; initialized at random: none." in out, err
    assert taming_jax.load_config(workdir / "config.json").data.name == config.data.name
    # A restarted run starts from the imported weights, and no setting can delete them.
    imported_checkpoint = workdir / "checkpoints" / "prior" / "0"
    restart_command = ("train_prior.py", *flags, "--prior.steps", 1, "--restart")
    status, out, err = commands.run_here(*restart_command, draw=False)
    assert status == 0 and "Starting from" in out and imported_checkpoint.is_dir(), err
    status, out, err = commands.run_here(*restart_command, "--prior.dropout", 0.3, draw=False)
    assert status == 0 and "Starting from" not in out and not imported_checkpoint.is_dir(), err
    assert (workdir / "checkpoints" / "prior-weights-only" / "0").is_dir()
    status, _, err = commands.run_here(
        *restart_command, "--prior.init-from", tmp_path / "none", draw=False
    )
    assert status == 2 and "none holds no prior checkpoint" in err, err
    assert taming_jax.load_run(workdir).step == 1


def test_settings_that_change_the_meaning_of_weights_are_reported(prior_workdir):
    """Such settings are another number of heads, or another stage 1."""
    checkpoint = Store(prior_workdir, "prior").load_best()
    config = checkpoint.config
    other_config = taming_jax.load_config(prior_workdir / "config.json", {"prior.heads": 2})
    frozen = {"generator": jax.tree.map(np.copy, checkpoint.generator)}
    arguments = (config, frozen, other_config, checkpoint.arrays)
    assert describe_mismatches(("transformer",), *arguments) == [
        "--prior.heads is 4, not 2 as in the run that the weights come from."
    ]
    frozen["generator"]["quant_conv"]["bias"][0] += 1
    assert "another stage 1" in describe_mismatches(("transformer",), *arguments)[1]
    arguments = (config, {}, *arguments[2:])
    assert describe_mismatches(("generator", "discriminator"), *arguments) == []
