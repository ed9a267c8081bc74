"""The kinds of priors in training, sampling, completion and evaluation of a run."""

import shutil

import jax
import numpy as np
import pytest

from taming_jax.config.priors import PRIOR_CONFIGS
from taming_jax.errors import UserError
from taming_jax.evaluation.report import evaluate
from taming_jax.parallel.devices import Devices
from taming_jax.priors.registry import PRIORS
from taming_jax.run import load_run
from taming_jax.training.prior import PriorStage
from tests import golden, small_runs

KINDS = [kind for kind in PRIORS if kind != "autoregressive"]  # test_prior.py tests that one
# Settings with which a prior can complete any part of a picture.
COMPLETING = {"random-order": {"prior__random_order__final_share": 0.2}}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose stage 1 has taken a step."""
    folder = tmp_path_factory.mktemp("kinds")
    small_runs.train(folder, vqgan__steps=1)
    return folder


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("kind", ["masked", pytest.param("random-order", marks=pytest.mark.slow)])
def test_several_devices_take_the_same_step_as_one(workdir, kind, count):
    settings = {"prior__dropout": 0.3, "prior__label_dropout": 0.5, "prior__kind": kind}
    results = {}
    for devices, parts in ((1, 1), (count, 2)):
        config = small_runs.make_config(workdir, **settings, prior__micro_batches=parts)
        stage = PriorStage(config, Devices(devices))
        feed, _ = stage.build_feeds()
        state = stage.devices.replicate(stage.init(jax.random.key(0)))
        losses = []
        for step in range(2):
            state, metrics = stage.train_step(state, feed.batch(step))
            losses.append(stage.devices.fetch(metrics))
        results[devices] = losses, stage.devices.fetch(state.nets["transformer"].opt_state)
    golden.assert_trees_close(results[count][0], results[1][0], "", 1e-5, 1e-6)
    golden.assert_trees_close(results[count][1], results[1][1], "", 1e-4, 1e-6)


@pytest.mark.parametrize("kind", ["masked", pytest.param("random-order", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(workdir, kind, tmp_path):
    settings = {
        "prior__kind": kind, "prior__steps": 12, "prior__log_every": 2, "prior__eval_every": 6,
        "prior__checkpoint_every": 4,
    }  # fmt: skip
    for name in ("whole", "killed"):
        shutil.copytree(workdir, tmp_path / name)
    small_runs.train(tmp_path / "whole", "prior", **settings)
    with pytest.raises(small_runs.Killed):
        small_runs.train(tmp_path / "killed", "prior", small_runs.kill_at(7), **settings)
    small_runs.train(tmp_path / "killed", "prior", prior__steps_per_dispatch=2, **settings)
    arrays, expected = (
        small_runs.read_arrays(tmp_path / name, 12, "prior") for name in ("killed", "whole")
    )
    assert set(arrays) == set(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=".".join(path))
    rows = [small_runs.read_rows(tmp_path / name, "prior") for name in ("killed", "whole")]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module", params=KINDS)
def run(request, workdir, tmp_path_factory):
    """A run of both stages with one of the kinds of priors, trained for two steps."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    shutil.copytree(workdir, folder)
    settings = {"prior__kind": request.param, "prior__steps": 2}
    settings |= COMPLETING.get(request.param, {})
    small_runs.train(folder, "prior", draw=True, **settings)
    return load_run(folder)


def test_samples_depend_only_on_seed_class_and_number(run):
    assert {"samples.png", "prior_loss.png"} <= {
        x.name for x in (run.workdir / "figures").iterdir()
    }
    samples = run.sample([0, 1], 9)
    assert samples.shape == (18, 8, 8, 1)
    np.testing.assert_array_equal(run.sample([1], 9, devices=1), samples[9:])
    assert (run.sample([1], 9, seed=1) != samples[9:]).any()


def test_a_completion_keeps_codes_on_all_sides_of_a_hole(run):
    images = run.load_data().test.images[:3]
    mask = np.ones(run.prior.grid, bool)
    mask[2:6, 2:6] = False
    codes = run.encode(images)
    drawing = run.sampler.plan_completions(codes, [0, 1, 0], 2, 0.5, mask)
    assert run.complete(images, [0, 1, 0], 2, mask=mask).shape == (6, 8, 8, 1)
    labels = np.array([0, 0, 1, 1, 0, 0])
    keys = jax.random.split(jax.random.key(0), 6)
    completed = jax.jit(run.prior.sample)(run.transformer, labels, keys, known=drawing.known).codes
    np.testing.assert_array_equal(completed[:, mask], np.repeat(codes, 2, 0)[:, mask])
    assert (np.asarray(completed) >= 0).all()


@pytest.mark.slow
def test_evaluation_reports_the_likelihood_or_why_there_is_none(run):
    report = evaluate(run, features="vgg", images=8, samples=8)
    grid = run.prior.grid
    try:
        run.prior.check_likelihood(grid)
    except UserError as error:
        assert f"No likelihood: {error}" in report["warnings"]
        assert "likelihood_bits_per_code" not in report["reconstruction"]
        with pytest.raises(UserError, match="no likelihood"):
            run.log_likelihood(np.zeros((1, 8, 8, 1), np.uint8), 0)
    else:
        assert report["reconstruction"]["likelihood_bits_per_code"] > 0


def test_settings_of_another_kind_are_refused_by_name(run):
    kind = run.config.prior.kind
    for other, settings in PRIOR_CONFIGS.items():
        for name in set(settings.decoding) - set(PRIOR_CONFIGS[kind].decoding):
            flag = name.replace("_", "-")
            with pytest.raises(UserError, match=f"{kind} has no sampling setting {flag}"):
                run.sample([0], **{name: getattr(settings(), name)})
            value = "halton" if name == "decoding_order" else 1
            changed = {f"prior__{other.replace('-', '_')}__{name}": value}
            with pytest.raises(UserError, match=f"is a setting of the prior {other}, but"):
                small_runs.make_config(None, prior__kind=kind, **changed)
    if kind == "masked":
        with pytest.raises(UserError, match="'decoding_order' cannot be 'Halton'"):
            run.sample([0], decoding_order="Halton")
    for name in PRIOR_CONFIGS[kind].unused:
        value = 0.5 if name == "token_keep_prob" else 64
        flag = "--prior." + name.replace("_", "-")
        with pytest.raises(UserError, match=f"{flag} has no effect on the prior {kind}"):
            small_runs.make_config(None, prior__kind=kind, **{f"prior__{name}": value})
