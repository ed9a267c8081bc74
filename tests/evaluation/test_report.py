"""Compares the report of a small run with metrics that are computed one by one."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from taming_jax.data import datasets
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.evaluation.measurements import find_nearest
from taming_jax.evaluation.protocol import Protocol
from taming_jax.evaluation.report import build_report, save_figures
from taming_jax.metrics import distances
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.run import load_run
from tests import commands

PROTOCOL = Protocol(split="train", images=70, samples=60, features="vgg", kept=50)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The user's cache folder, in a temporary place."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(prior_workdir):
    return load_run(prior_workdir)


@pytest.fixture(scope="module")
def evaluation(run, cache):
    return Evaluator(run, PROTOCOL, devices=1)


@pytest.fixture(scope="module")
def report(evaluation):
    return build_report(evaluation)


@pytest.fixture(scope="module")
def compute_features(evaluation):
    return lambda images: evaluation.features(images)[0]


def test_the_metrics_of_reconstructions_equal_those_computed_directly(
    run, report, compute_features
):
    split = datasets.load(run.config.data).train
    images = split.images[np.linspace(0, len(split.images) - 1, 70).astype(int)]
    reconstructions = run.reconstruct(images)
    metrics, difference = report["reconstruction"], images.astype(float) - reconstructions
    assert metrics["l1"] == pytest.approx(np.abs(difference).mean() / 255, rel=1e-5)
    psnr = -10 * np.log10(np.square(difference / 255).mean((1, 2, 3)))
    assert metrics["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    expected = np.asarray(lpips(load_lpips(), to_float(images), to_float(reconstructions))).mean()
    assert metrics["lpips"] == pytest.approx(expected, rel=1e-4)
    counts = np.bincount(run.encode(images).ravel(), minlength=run.config.vqgan.codebook_size)
    assert metrics["code_counts"] == counts.tolist()
    assert metrics["usage"] == (counts > 0).mean()
    shares = counts[counts > 0] / counts.sum()
    assert metrics["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    real, fake = (distances.compute_moments(compute_features(x)) for x in (images, reconstructions))
    assert metrics["fd"] == pytest.approx(distances.frechet_distance(real, fake), rel=1e-3)
    labels = split.labels[np.linspace(0, len(split.images) - 1, 70).astype(int)]
    bits = -run.log_likelihood(images, labels).mean() / np.log(2) / counts.sum() * 70
    assert metrics["likelihood_bits_per_code"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
def test_the_metrics_of_samples_equal_those_computed_directly(run, report, compute_features):
    """The samples are those of `Run.sample`, and their classes have the same frequencies as in the
    split."""
    split = datasets.load(run.config.data).train
    order = np.sort(split.labels[np.linspace(0, len(split.images) - 1, 70).astype(int)])
    classes, counts = np.unique(order[np.arange(60) * 70 // 60], return_counts=True)
    images = np.concatenate(
        [to_uint8(run.sample(int(c), int(n))) for c, n in zip(classes, counts, strict=True)]
    )
    fake = compute_features(images)
    real = compute_features(split.images[np.linspace(0, len(split.images) - 1, 70).astype(int)])
    metrics = report["samples"]
    fd = distances.frechet_distance(
        distances.compute_moments(fake), distances.compute_moments(real)
    )
    assert metrics["fd"] == pytest.approx(fd, rel=1e-3)
    kept = [x[np.linspace(0, len(x) - 1, 50).astype(int)] for x in (fake, real)]
    assert metrics["kd"] == pytest.approx(distances.kernel_distance(*kept)[0], rel=1e-3)
    manifold = distances.compute_prdc(kept[1], kept[0])
    assert {name: metrics[name] for name in manifold} == pytest.approx(manifold)


def test_the_protocol_describes_the_measurement(run, report):
    protocol = report["protocol"]
    assert report["features"] == "FD-VGG16" and protocol["features"] == "VGG16"
    assert protocol["vqgan_step"] is None and protocol["prior_step"] == run.step
    assert (protocol["split"], protocol["images"], protocol["samples"]) == ("train", 70, 60)
    assert protocol["guidance_scale"] == run.config.prior.guidance_scale
    assert any("biased upward" in warning for warning in report["warnings"])
    assert protocol["images_hash"] and protocol["reference"] is None
    json.dumps(report)


@pytest.mark.slow
def test_four_devices_give_the_same_report(run, report, cache):
    repeated = build_report(Evaluator(run, PROTOCOL, devices=4))
    for kind in ("reconstruction", "samples"):
        for name, value in repeated[kind].items():
            if isinstance(value, float):
                assert value == pytest.approx(report[kind][name], rel=1e-4, abs=1e-6), name
    assert repeated["protocol"] == report["protocol"]


def test_impossible_protocols_are_refused(run, cache, tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for change, message in (
        ({"split": "holdout"}, "there is no split 'holdout'; choose train, validation or test"),
        ({"features": "resnet"}, "the features 'resnet' do not exist"),
        (
            {"features": "inception", "weights": tmp_path / "no.pth"},
            r"no.pth does not have InceptionV3's weights \(there is no file .*\); download them",
        ),
        ({"images": 0}, "images is 0; it must be 1 or more"),
        ({"images": 1}, "1 image of the split 'train' is selected, but metrics of samples need"),
        ({"samples": 1}, "samples is 1; it must be 0, or 2 or more"),
        ({"kept": 1}, "kept is 1; it must be 2 or more"),
        ({"top_k": 0}, "top-k is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"reference": tmp_path / "adm.npz"}, "these features have 512 dimensions"),
    ):
        with pytest.raises(UserError, match=message):
            Evaluator(run, dataclasses.replace(PROTOCOL, **change))


@pytest.fixture
def evaluate(capsys):
    """Returns a function that runs the command in this process and returns its exit status, stdout,
    and stderr."""

    def call(*arguments):
        return commands.run_for_status("scripts/evaluate.py", *arguments), *capsys.readouterr()

    return call


def test_the_command_writes_a_report_and_compares_two_reports(
    evaluate, vqgan_workdir, cache, tmp_path
):
    """Evaluates a run without a prior. The output says that there are no samples."""
    out, other = tmp_path / "one.json", tmp_path / "other.json"
    arguments = ["--workdir", vqgan_workdir, "--features", "vgg", "--images", 10, "--devices", 1]
    reference = tmp_path / "kept.npz"
    status, output, err = evaluate(*arguments, "--out", out, "--save-reference", reference)
    assert status == 0, err
    assert (
        "the run has no prior yet" in output and "FD-VGG16" in output and "biased upward" in output
    )
    assert (tmp_path / "evaluation_codes.png").exists()
    results = json.loads(out.read_text())
    assert results["samples"] is None
    assert distances.load_moments(reference, 512).count == 10
    results["protocol"] |= {"vqgan_step": 7}
    other.write_text(json.dumps(results))
    status, output, err = evaluate("--compare", out, other)
    assert status == 0 and "can be compared" in output, err
    results["protocol"] |= {"split": "train"}
    other.write_text(json.dumps(results))
    status, output, err = evaluate("--compare", out, other)
    assert status == 1 and "cannot be compared: split is test and train" in err


@pytest.mark.slow
def test_the_figures_show_the_codes_and_the_nearest_images(evaluation, report, tmp_path):
    save_figures(evaluation, tmp_path, report)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"evaluation_codes.png", "evaluation_nearest.png"}
    # Two images of each of the four classes.
    images, closest, nearest_distances = find_nearest(evaluation, 8)
    train = datasets.load(evaluation.run.config.data).train.images
    assert images.shape == closest.shape == (8, 16, 16, 1) and nearest_distances.shape == (8,)
    assert len(np.unique(images, axis=0)) == 8
    assert all((train == image).all((1, 2, 3)).any() for image in closest)


def test_a_run_with_other_data_is_not_evaluated(run, cache):
    changed_run = copy.copy(run)
    counts = run.dataset["images"]
    changed_run.dataset = run.dataset | {"images": {name: n + 1 for name, n in counts.items()}}
    with pytest.raises(UserError, match="trained on other data: there are 486 training images"):
        Evaluator(changed_run, PROTOCOL)


def test_mistakes_are_reported_in_one_line(evaluate, prior_workdir, tmp_path):
    for arguments, message in (
        ([], "name a run with --workdir"),
        (["--workdir", tmp_path / "none"], "there is no folder"),
        (
            ["--workdir", prior_workdir, "--samples", "1"],
            "samples is 1; it must be 0, or 2 or more",
        ),
        (["--workdir", prior_workdir, "--guidance-scale", "-2"], "guidance"),
        (["--workdir", prior_workdir, "--out", tmp_path], "is a folder; name a file in it"),
        (
            ["--workdir", prior_workdir, "--out", tmp_path / "no" / "x.json"],
            "cannot be written (No such",
        ),
        (["--compare", tmp_path / "a.json", tmp_path / "b.json"], "there is no file"),
    ):
        status, _, err = evaluate(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
