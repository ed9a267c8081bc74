"""Tests of stage 2: what a step computes on any number of devices, and what a run keeps."""

import functools
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.parallel.devices import Devices
from taming_jax.priors.autoregressive import GPT, corrupt_codes
from taming_jax.training import accumulate
from taming_jax.training.checkpoints import Store
from taming_jax.training.prior import (
    PriorStage,
    build_optimizer,
    build_prior_schedule,
    init_transformer,
    train_step,
)
from taming_jax.training.state import CODES, LABELS, make_example_keys
from tests import commands, golden, small_runs
from tests.conftest import TINY
from tests.training.test_precision import iterate_operations
from tests.training.test_resume import stop_after

SMALL = {"batch_size": 8, "layers": 1, "heads": 2, "width": 32}


def make_stage(workdir, count=1, **prior):
    run = load_config(str(workdir / "config.json"))
    overrides = {f"prior.{key}": value for key, value in {**SMALL, **prior}.items()}
    overrides |= {"workdir": str(workdir), "config": run.config}
    return PriorStage(load_config(str(workdir / "config.json"), overrides), Devices(count))


@pytest.mark.parametrize("counts", [(1, 4), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_several_devices_take_the_same_step_as_one(vqgan_workdir, counts):
    settings = {
        "dropout": 0.3,
        "attention_dropout": 0.3,
        "label_dropout": 0.5,
        "token_keep_prob": 0.8,
    }
    results = {}
    for count in counts:
        stage = make_stage(vqgan_workdir, count, **settings)
        feed, _ = stage.build_feeds()
        state = stage.devices.replicate(stage.init(jax.random.key(0)))
        # Two steps, because Adam's first step amplifies the noise of small gradients.
        losses = []
        for step in range(2):
            state, metrics = stage.train_step(state, feed.batch(step))
            losses.append(stage.devices.fetch(metrics))
        results[count] = losses, stage.devices.fetch(state.nets["transformer"].opt_state)
    for count in counts[1:]:
        golden.assert_trees_close(results[count][0], results[1][0], f"{count} devices ", 1e-5, 1e-6)
        # Adam's first moment is the averaged gradient.
        golden.assert_trees_close(results[count][1], results[1][1], f"{count} devices ", 1e-4, 1e-6)


def test_a_step_has_no_activation_with_an_entry_per_token():
    """A product with one-hot vectors of the embedding table would have one. Only the table itself,
    its gradient, and Adam's moments, have as many rows."""
    config = load_config("birds")
    model, batch = GPT.build(config, 200), config.prior.batch_size
    state = jax.eval_shape(lambda: init_transformer(config, model, jax.random.key(0)))
    arrays = {
        "images": jnp.zeros((batch, model.length), jnp.int32),
        "labels": jnp.zeros(batch, jnp.int32), "place": jnp.arange(batch),
    }  # fmt: skip
    step = functools.partial(train_step, config, model, 1000, None)
    jaxpr = jax.make_jaxpr(step)(state, arrays)
    tokens = model.null_token + 1
    assert tokens == config.vqgan.codebook_size + 200 + 1
    shapes = {
        variable.aval.shape
        for operation in iterate_operations(jaxpr)
        for variable in operation.outvars
        if tokens in variable.aval.shape
    }
    assert shapes == {(tokens, config.prior.width)}


@pytest.mark.slow
def test_four_micro_batches_take_the_same_step_as_one_batch(vqgan_workdir, monkeypatch):
    monkeypatch.setattr(accumulate, "should_unroll", lambda: False)  # compiles faster
    settings = {
        "dropout": 0.3,
        "attention_dropout": 0.3,
        "label_dropout": 0.5,
        "token_keep_prob": 0.8,
    }
    results = {}
    for count, parts in ((1, 1), (2, 4)):
        stage = make_stage(vqgan_workdir, count, **settings, micro_batches=parts)
        feed, _ = stage.build_feeds()
        state = stage.devices.replicate(stage.init(jax.random.key(0)))
        state, metrics = stage.train_step(state, feed.batch(0))
        # Adam's first moment is the averaged gradient times a constant.
        results[count, parts] = stage.devices.fetch((metrics, state.nets["transformer"].opt_state))
    golden.assert_trees_close(results[2, 4], results[1, 1], "", 1e-5, 1e-6)


def test_a_step_drops_labels_and_corrupts_codes(vqgan_workdir):
    """Compares the loss of a step with the loss computed from its parts."""
    stage = make_stage(vqgan_workdir, dropout=0.0, label_dropout=0.5, token_keep_prob=0.7)
    feed, _ = stage.build_feeds()
    batch = feed.batch(0)
    state = stage.init(jax.random.key(0))
    params = jax.tree.map(np.array, state.nets["transformer"].params)
    _, metrics = stage.train_step(state, batch)
    index = np.asarray(batch.arrays["index"])
    codes = np.asarray(batch.arrays["images"])[index].astype(np.int32)
    labels = np.asarray(batch.arrays["labels"])[index]
    place = jnp.arange(8)
    dropped = [
        bool(jax.random.bernoulli(key, 0.5))
        for key in make_example_keys(stage.config.seed, LABELS, jnp.int32(0), place)
    ]
    assert 0 < sum(dropped) < 8
    tokens = stage.model.shift_right(np.where(dropped, stage.model.classes, labels), codes)
    keys = make_example_keys(stage.config.seed, CODES, jnp.int32(0), place)
    corrupted = [
        corrupt_codes(0.7, 128, key, row) for key, row in zip(keys, tokens[:, 1:], strict=True)
    ]
    tokens = jnp.concatenate([tokens[:, :1], jnp.stack(corrupted)], 1)
    logits = np.asarray(stage.model.apply({"params": params}, tokens), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probs, codes[..., None], -1).mean()
    assert metrics.unpack()[0]["nll"] == pytest.approx(nll, rel=1e-5)


def test_a_non_finite_step_is_skipped(vqgan_workdir):
    stage = make_stage(vqgan_workdir)
    feed, _ = stage.build_feeds()
    state = stage.init(jax.random.key(0))
    params = state.nets["transformer"].params
    params["head"] = params["head"].at[0, 0].set(jnp.inf)
    before = jax.tree.map(np.array, state)
    after, packed = stage.train_step(state, feed.batch(0))
    (metrics,) = packed.unpack()
    assert not np.isfinite(metrics["nll"]) and metrics["skipped"] == 1
    assert (int(after.step), int(after.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, after.nets, before.nets)


def test_corruption_keeps_the_given_share_of_codes():
    codes = jnp.full(20_000, 7)
    kept = (corrupt_codes(0.7, 64, jax.random.key(0), codes) == 7).mean()
    assert kept == pytest.approx(0.7 + 0.3 / 64, abs=0.02)


def test_weight_decay_applies_only_to_matrices():
    config = load_config("mnist_tiny", {"prior.weight_decay": 0.5})
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = build_optimizer(config).update(zeros, build_optimizer(config).init(params), params)
    assert (updates["matrix"] == 0.5).all() and (updates["vector"] == 0).all()


def test_the_one_cycle_schedule_has_pytorchs_first_highest_and_last_rates():
    config = load_config("mnist", {"prior.learning_rate": 3e-4})
    rates = np.array([build_prior_schedule(config, 1000)(step) for step in range(1001)])
    np.testing.assert_allclose(rates[[0, 300, 1000]], [3e-4 / 25, 3e-4, 3e-4 / 25e4], rtol=1e-3)
    assert (np.diff(rates[:301]) > 0).all() and (np.diff(rates[300:]) < 0).all()


def test_the_cosine_schedule_warms_up_and_decays_to_zero():
    config = load_config("mnist", {"prior.schedule": "cosine", "prior.warmup_steps": 100})
    rates = np.array([build_prior_schedule(config, 1000)(step) for step in range(1000)])
    assert rates.argmax() == 99 and rates[99] == pytest.approx(config.prior.learning_rate)
    assert rates[0] == pytest.approx(rates[99] / 100, rel=1e-4) and rates[-1] < 1e-9


@pytest.mark.slow
def test_a_step_needs_hardly_more_flops_than_the_transformer():
    """At the sizes of `mnist`, the transformer needs 6 FLOPs per parameter and code, and those of
    the attention products."""
    config = load_config("mnist")
    model = GPT.build(config, 10)
    b, t, width, layers = 256, model.length, 256, 6
    arrays = {
        "images": jax.ShapeDtypeStruct((57000, t), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((57000,), jnp.int32),
        "index": jax.ShapeDtypeStruct((b,), jnp.int32),
        "place": jax.ShapeDtypeStruct((b,), jnp.int32),
    }
    state = jax.eval_shape(lambda: init_transformer(config, model, jax.random.key(0)))
    step = jax.jit(train_step, static_argnums=(0, 1, 2, 3))
    flops = step.lower(config, model, 100, None, state, arrays).compile().cost_analysis()["flops"]
    parameters = sum(p.size for p in jax.tree.leaves(state.nets["transformer"].params))
    # Each layer has two attention products of t x t x width forward, and four backward.
    expected = 6 * parameters * b * t + 6 * 2 * b * t * t * width * layers
    assert flops == pytest.approx(expected, rel=0.1)


COMMAND = [
    "train_prior.py", "--config", "mnist_tiny", "--prior.batch-size", "8", "--prior.layers", "1",
    "--prior.heads", "2", "--prior.width", "32", "--workdir",
]  # fmt: skip


@pytest.mark.slow
def test_a_killed_prior_command_resumes_bit_for_bit_with_its_own_generator(vqgan_workdir, tmp_path):
    uninterrupted, killed = (
        shutil.copytree(vqgan_workdir, tmp_path / name) for name in ("uninterrupted", "killed")
    )
    settings = [
        "--prior.steps", 300, "--prior.checkpoint-every", 50, "--prior.dropout", 0.2,
        "--seed", 2**32 - 1,
    ]  # fmt: skip
    status, out, err = commands.run(*COMMAND, uninterrupted, *settings)
    assert status == 0, err
    assert {f.name for f in (uninterrupted / "figures").iterdir()} >= {
        "prior_loss.png",
        "samples.png",
    }
    stores = [Store(workdir, "prior") for workdir in (uninterrupted, killed)]
    first = killed / "checkpoints" / "prior" / "50"
    status, _ = stop_after([*COMMAND, killed, *settings], first, signal.SIGKILL)
    assert status == -signal.SIGKILL and stores[1].steps() and 300 not in stores[1].steps()
    # Stage 1 is trained further in between.
    status, out, err = commands.run("train_vqgan.py", *TINY, 5, "--workdir", killed)
    assert status == 0, err
    status, out, err = commands.run(*COMMAND, killed, *settings)
    assert status == 0, err
    expected, arrays = (store.read(300).arrays for store in stores)
    assert set(arrays) == set(expected) and any("generator" in path for path in arrays)
    for path, array in expected.items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=".".join(path))
    vqgan_arrays = Store(killed, "vqgan").read(5).arrays
    changed_paths = [
        p
        for p in vqgan_arrays
        if "ema" in p and (vqgan_arrays[p] != expected[(*p[:2], "params", *p[3:])]).any()
    ]
    assert changed_paths, "stage 1 has changed"
    rows = (uninterrupted / "metrics" / "prior.jsonl").read_text().splitlines()
    validation = json.loads(rows[-1])
    bits = validation["nll"] * 64 / (16 * 16) / np.log(2)
    assert validation["code_bits_per_subpixel"] == pytest.approx(bits)


@pytest.mark.slow
def test_a_killed_prior_resumes_bit_for_bit_with_its_own_generator(tmp_path):
    vqgan_settings = {"vqgan__steps": 5, "vqgan__checkpoint_every": 3}
    with pytest.raises(small_runs.Killed):
        small_runs.train(
            tmp_path / "uninterrupted", on_step=small_runs.kill_at(4), **vqgan_settings
        )
    assert small_runs.list_saved_steps(tmp_path / "uninterrupted") == [3]
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "killed")
    settings = vqgan_settings | {"prior__steps": 14, "prior__checkpoint_every": 4}
    settings |= {"prior__eval_every": 7, "prior__dropout": 0.2, "seed": 2**32 - 1}
    small_runs.train(tmp_path / "uninterrupted", "prior", **settings)
    with pytest.raises(small_runs.Killed):
        small_runs.train(tmp_path / "killed", "prior", on_step=small_runs.kill_at(10), **settings)
    assert small_runs.list_saved_steps(tmp_path / "killed", "prior") == [7, 8]
    small_runs.train(tmp_path / "killed", **vqgan_settings)  # trains stage 1 further
    small_runs.train(tmp_path / "killed", "prior", **settings)
    small_runs.assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted", 14, "prior")
    prior_arrays = small_runs.read_arrays(tmp_path / "uninterrupted", 14, "prior")
    assert any("generator" in path for path in prior_arrays)
    vqgan_arrays = small_runs.read_arrays(tmp_path / "killed", 5)
    changed_paths = [
        p
        for p in vqgan_arrays
        if "ema" in p and (vqgan_arrays[p] != prior_arrays[(*p[:2], "params", *p[3:])]).any()
    ]
    assert changed_paths, "stage 1 has changed"
    validation = small_runs.read_rows(tmp_path / "uninterrupted", "prior")[-1]
    bits = validation["nll"] / np.log(2)  # one code per pixel
    assert validation["code_bits_per_subpixel"] == pytest.approx(bits)


def test_a_run_leaves_its_figures(prior_workdir):
    figures = {file.name for file in (prior_workdir / "figures").iterdir()}
    assert figures >= {"prior_loss.png", "samples.png"}


def test_bad_input_is_reported_in_one_line(vqgan_workdir, tmp_path):
    for arguments, message in (
        (
            [*COMMAND, tmp_path / "a run"],
            "or train one with `python train_vqgan.py --config mnist_tiny --workdir "
            f"'{tmp_path}/a run'`.\n",
        ),
        (
            [*COMMAND, vqgan_workdir, "--vqgan.codebook-size", 64],
            "--vqgan.codebook-size is 64, not 128",
        ),
        (
            [*COMMAND, vqgan_workdir, "--prior.warmup-steps", 3],
            "requires --prior.schedule cosine",
        ),
        (
            [*COMMAND, vqgan_workdir, "--prior.heads", 3],
            "--prior.width 32 does not fit --prior.heads 3",
        ),
        ([*COMMAND, vqgan_workdir, "--prior.batch-size", 0], "--prior.batch-size is 0"),
    ):
        status, _, err = commands.run_here(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []
