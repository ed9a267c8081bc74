"""Compares the Fréchet distances that both stages compute during training with direct
computations."""

import jax
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.data.datasets import Split
from taming_jax.data.pixels import to_float, to_uint8
from taming_jax.errors import UserError
from taming_jax.metrics import distances, monitor
from taming_jax.models.vqgan import decode_indices, reconstruct
from taming_jax.parallel.devices import Devices
from taming_jax.priors.decoding import sample_keys
from taming_jax.training.prior import PriorStage
from taming_jax.training.vqgan import VQGANStage

SETTINGS = load_config("mnist_tiny")


def compute_expected_distance(features, images, generated):
    one, other = (distances.compute_moments(features(x)[0]) for x in (images, generated))
    return distances.frechet_distance(one, other)


@pytest.mark.slow
def test_the_distance_of_reconstructions_equals_a_direct_computation(vqgan_workdir):
    config = load_config(vqgan_workdir / "config.json", {"vqgan.fd_every": 1})
    devices = Devices(2)
    stage = VQGANStage(config, devices)
    state = stage.init(jax.random.key(0))
    images, params = stage.splits.validation.images, state.nets["generator"].eval_params
    generated = reconstruct(stage.objective.generator, params, to_float(images)).images
    distance = stage.compute_fd(devices.replicate(state))
    assert distance == pytest.approx(
        compute_expected_distance(stage._monitor.features, images, np.asarray(to_uint8(generated))),
        rel=1e-3,
    )


@pytest.mark.slow
def test_the_distance_of_samples_equals_a_direct_computation(prior_workdir):
    config = load_config(
        prior_workdir / "config.json", {"prior.fd_every": 1, "workdir": str(prior_workdir)}
    )
    devices = Devices(2)
    stage = PriorStage(config, devices)
    state = stage.init(jax.random.key(0))
    split, params = stage.splits.validation, state.nets["transformer"].params
    # `Run.sample` also numbers the samples within their classes.
    numbers = np.array([(split.labels[:i] == c).sum() for i, c in enumerate(split.labels)])
    codes = stage.model.sample(
        params, split.labels, sample_keys(np.uint32(config.seed), split.labels, numbers),
        temperature=config.prior.temperature, top_k=config.prior.top_k, top_p=config.prior.top_p,
        guidance_scale=config.prior.guidance_scale,
    ).codes  # fmt: skip
    generated = decode_indices(stage.vqgan, stage.frozen["generator"], codes)
    distance = stage.compute_fd(devices.replicate(state))
    assert distance == pytest.approx(
        compute_expected_distance(
            stage._monitor.features, split.images, np.asarray(to_uint8(generated))
        ),
        rel=1e-3,
    )


@pytest.mark.slow
def test_a_large_split_is_subsampled_and_computed_in_batches(monkeypatch):
    """The split has more images than the limit, and the limit is more than a batch. Each selected
    image is used once."""
    monkeypatch.setattr(monitor, "MAX_IMAGES", 40)
    images = np.random.default_rng(0).integers(0, 256, (90, 28, 28, 1)).astype(np.uint8)
    monitored = monitor.ValidationFD(Split(images, np.zeros(90, np.int32)), SETTINGS, Devices(1))
    numbers = []

    def darken(batch):
        numbers.append(np.asarray(batch["numbers"]).ravel())
        return batch["images"] // 2

    rows = np.linspace(0, 89, 40).astype(int)
    for _ in range(2):
        distance = monitored.compute(darken)
        assert distance == pytest.approx(
            compute_expected_distance(monitored.features, images[rows], images[rows] // 2), rel=1e-4
        )
    np.testing.assert_array_equal(np.unique(np.concatenate(numbers)), np.arange(40))


def test_one_image_has_no_distance():
    with pytest.raises(UserError, match="the validation split has only one image"):
        monitor.ValidationFD(
            Split(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1)), SETTINGS, Devices(1)
        )


def test_samples_are_numbered_within_their_class():
    labels = np.array([2, 0, 2, 2, 0, 1])
    assert monitor.number_within_classes(labels).tolist() == [0, 0, 1, 2, 1, 0]
    assert monitor.number_within_classes(labels[:0]).tolist() == []
