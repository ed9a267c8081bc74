"""A small run's report against the same figures taken one by one."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from taming_jax.data import datasets
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.evaluator import Evaluator
from taming_jax.evaluation.measurements import nearest
from taming_jax.evaluation.protocol import Protocol
from taming_jax.evaluation.report import draw, finished
from taming_jax.metrics import distances
from taming_jax.models.lpips import load_lpips, lpips
from taming_jax.run import load_run
from tests import commands

PROTOCOL = Protocol(split="train", images=70, samples=60, features="vgg", kept=50)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The user's cache, elsewhere."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(both):
    return load_run(both)


@pytest.fixture(scope="module")
def evaluation(run, cache):
    return Evaluator(run, PROTOCOL, devices=1)


@pytest.fixture(scope="module")
def report(evaluation):
    return finished(evaluation)


@pytest.fixture(scope="module")
def features_of(evaluation):
    return lambda images: evaluation.features(images)[0]


def test_reconstructions(run, report, features_of):
    split = datasets.load(run.config.data).train
    images = split.images[np.linspace(0, len(split.images) - 1, 70).astype(int)]
    again = run.reconstruct(images)
    found, difference = report["reconstruction"], images.astype(float) - again
    assert found["l1"] == pytest.approx(np.abs(difference).mean() / 255, rel=1e-5)
    psnr = -10 * np.log10(np.square(difference / 255).mean((1, 2, 3)))
    assert found["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    expected = np.asarray(lpips(load_lpips(), to_float(images), to_float(again))).mean()
    assert found["lpips"] == pytest.approx(expected, rel=1e-4)
    counts = np.bincount(run.encode(images).ravel(), minlength=run.config.vqgan.codebook_size)
    assert found["code_counts"] == counts.tolist()
    assert found["usage"] == (counts > 0).mean()
    shares = counts[counts > 0] / counts.sum()
    assert found["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    real, fake = (distances.moments(features_of(x)) for x in (images, again))
    assert found["fd"] == pytest.approx(distances.frechet_distance(real, fake), rel=1e-3)
    labels = split.labels[np.linspace(0, len(split.images) - 1, 70).astype(int)]
    bits = -run.log_likelihood(images, labels).mean() / np.log(2) / counts.sum() * 70
    assert found["likelihood_bits_per_code"] == pytest.approx(bits, rel=1e-5)


def test_samples(run, report, features_of):
    """They are those of `Run.sample`, of the classes as often as the split has them."""
    split = datasets.load(run.config.data).train
    order = np.sort(split.labels[np.linspace(0, len(split.images) - 1, 70).astype(int)])
    classes, counts = np.unique(order[np.arange(60) * 70 // 60], return_counts=True)
    images = np.concatenate(
        [to_uint8(run.sample(int(c), int(n))) for c, n in zip(classes, counts, strict=True)]
    )
    fake = features_of(images)
    real = features_of(split.images[np.linspace(0, len(split.images) - 1, 70).astype(int)])
    found = report["samples"]
    fd = distances.frechet_distance(distances.moments(fake), distances.moments(real))
    assert found["fd"] == pytest.approx(fd, rel=1e-3)
    kept = [x[np.linspace(0, len(x) - 1, 50).astype(int)] for x in (fake, real)]
    assert found["kd"] == pytest.approx(distances.kernel_distance(*kept)[0], rel=1e-3)
    manifold = distances.manifold(kept[1], kept[0])
    assert {name: found[name] for name in manifold} == pytest.approx(manifold)


def test_the_protocol_says_what_was_measured(run, report):
    protocol = report["protocol"]
    assert report["features"] == "FD-VGG16" and protocol["features"] == "VGG16"
    assert protocol["vqgan_step"] is None and protocol["prior_step"] == run.step
    assert (protocol["split"], protocol["images"], protocol["samples"]) == ("train", 70, 60)
    assert protocol["guidance_scale"] == run.config.prior.guidance_scale
    assert any("biased upwards" in said for said in report["warnings"])
    assert protocol["images_hash"] and protocol["reference"] is None
    json.dumps(report)


@pytest.mark.slow
def test_four_devices_report_the_same(run, report, cache):
    again = finished(Evaluator(run, PROTOCOL, devices=4))
    for kind in ("reconstruction", "samples"):
        for name, value in again[kind].items():
            if isinstance(value, float):
                assert value == pytest.approx(report[kind][name], rel=1e-4, abs=1e-6), name
    assert again["protocol"] == report["protocol"]


def test_what_cannot_be_measured(run, cache, tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for change, said in (
        ({"split": "holdout"}, "there is no split 'holdout'; take train, validation or test"),
        ({"features": "resnet"}, "there are no features 'resnet'"),
        (
            {"features": "inception", "weights": tmp_path / "no.pth"},
            r"no.pth does not hold InceptionV3's weights \(there is no file .*\); get them",
        ),
        ({"images": 0}, "images is 0; it must be 1 or more"),
        ({"images": 1}, "1 image of the split 'train' was chosen, and distances of samples need"),
        ({"samples": 1}, "samples is 1; it must be 2 or more"),
        ({"kept": 1}, "kept is 1; it must be 2 or more"),
        ({"top_k": 0}, "top-k is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"reference": tmp_path / "adm.npz"}, "these features have 512 dimensions"),
    ):
        with pytest.raises(UserError, match=said):
            Evaluator(run, dataclasses.replace(PROTOCOL, **change))


@pytest.fixture
def evaluate(capsys):
    """The command in this process: its exit status, stdout and stderr."""

    def call(*arguments):
        return commands.status_of("scripts/evaluate.py", *arguments), *capsys.readouterr()

    return call


def test_the_command(evaluate, stage1, cache, tmp_path):
    """Of a run without a prior: reconstructions, a sentence on samples; then two reports."""
    out, other = tmp_path / "one.json", tmp_path / "other.json"
    given = ["--workdir", stage1, "--features", "vgg", "--images", 10, "--devices", 1]
    kept = tmp_path / "kept.npz"
    status, said, err = evaluate(*given, "--out", out, "--save-reference", kept)
    assert status == 0, err
    assert "the run has no prior yet" in said and "FD-VGG16" in said and "biased upwards" in said
    assert (tmp_path / "evaluation_codes.png").exists()
    found = json.loads(out.read_text())
    assert found["samples"] is None
    assert distances.load_moments(kept, 512).count == 10
    found["protocol"] |= {"vqgan_step": 7}
    other.write_text(json.dumps(found))
    status, said, err = evaluate("--compare", out, other)
    assert status == 0 and "can be compared" in said, err
    found["protocol"] |= {"split": "train"}
    other.write_text(json.dumps(found))
    status, said, err = evaluate("--compare", out, other)
    assert status == 1 and "cannot be compared: split is test and train" in err


def test_figures(evaluation, report, tmp_path):
    draw(evaluation, tmp_path, report)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"evaluation_codes.png", "evaluation_nearest.png"}
    images, closest, far = nearest(evaluation, 8)  # two of each of the four classes
    train = datasets.load(evaluation.run.config.data).train.images
    assert images.shape == closest.shape == (8, 16, 16, 1) and far.shape == (8,)
    assert len(np.unique(images, axis=0)) == 8
    assert all((train == image).all((1, 2, 3)).any() for image in closest)


def test_a_run_of_other_data_is_not_measured(run, cache):
    changed = copy.copy(run)
    counts = run.dataset["images"]
    changed.dataset = run.dataset | {"images": {name: n + 1 for name, n in counts.items()}}
    with pytest.raises(UserError, match="trained on other data: there are 486 training images"):
        Evaluator(changed, PROTOCOL)


def test_mistakes_are_a_sentence(evaluate, both, tmp_path):
    for given, said in (
        ([], "name the run by --workdir"),
        (["--workdir", tmp_path / "none"], "there is no folder"),
        (["--workdir", both, "--samples", "1"], "samples is 1; it must be 2 or more"),
        (["--workdir", both, "--guidance-scale", "-2"], "guidance"),
        (["--workdir", both, "--out", tmp_path], "is a folder; name a file in it"),
        (["--workdir", both, "--out", tmp_path / "no" / "x.json"], "cannot be written (No such"),
        (["--compare", tmp_path / "a.json", tmp_path / "b.json"], "there is no file"),
    ):
        status, _, err = evaluate(*given)
        assert status == 2 and said in err and err.count("\n") == 1, err
