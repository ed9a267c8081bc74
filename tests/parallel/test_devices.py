"""Tests that the same step function runs on one device and on several."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taming_jax.config.load import load_config
from taming_jax.config.schema import DataConfig
from taming_jax.data import datasets
from taming_jax.data.augment import augment
from taming_jax.data.batches import ResidentFeed, gather_batch
from taming_jax.data.pixels import to_float
from taming_jax.errors import UserError
from taming_jax.parallel.devices import (
    MAX_JOINED,
    Devices,
    copy_buffers,
    get_compute_capability,
    get_default_device,
    resolve_dtype,
)
from taming_jax.training.checkpoints import Store
from taming_jax.training.state import AUGMENTATION, make_example_keys
from taming_jax.training.vqgan import VQGANStage
from taming_jax.training.vqgan_step import VQGANObjective
from tests import commands, golden, small_runs

OVERRIDES = {
    "vqgan.batch_size": 16, "vqgan.discriminator_start": 0.0, "vqgan.steps": 200,
    "vqgan.adaptive_weight": True,
}  # fmt: skip


def test_later_steps_do_not_change_fetched_arrays():
    for count in (1, 4):
        devices = Devices(count)
        step = devices.compile(lambda state, arrays: state + arrays.sum(), donate=True)
        state = devices.replicate(jnp.zeros(1000))
        before, snapshot = devices.fetch(state), devices.snapshot(state)
        state = step(state, devices.shard(np.ones(4, np.float32)))
        assert (before == 0).all() and (devices.fetch(state) == 4 / count).all()
        assert snapshot.shape == (1000,) and (np.asarray(snapshot) == 0).all()


def test_copied_trees_share_no_buffer():
    tree = {"w": jax.device_put(np.ones(8, np.float32))}
    copies = copy_buffers({"a": tree["w"], "b": tree["w"]})
    pointers = {x.unsafe_buffer_pointer() for x in (tree["w"], *jax.tree.leaves(copies))}
    assert len(pointers) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_rows_are_fetched_in_order(count):
    """The arrays hold one row or three, and are more than are joined on a device."""
    devices, n = Devices(count), MAX_JOINED + 6
    shapes = [(2,) if i % 2 else (3, 2) for i in range(n)]
    rows = [np.full(shape, i, np.float32) for i, shape in enumerate(shapes)]
    expected = np.concatenate([x.reshape(-1, 2) for x in rows])
    fetched = devices.fetch_rows([devices.replicate(x) for x in rows], 2)
    np.testing.assert_array_equal(fetched, expected)


def test_the_default_device_may_be_set_by_its_platform():
    device = jax.local_devices()[1]
    for value, expected in ((None, 0), ("cpu", 0), (device, 1)):
        with jax.default_device(value):
            assert get_default_device() == jax.local_devices()[expected]


def test_auto_means_bfloat16_where_all_gpus_have_it(monkeypatch):
    def make_gpu(capability):
        return types.SimpleNamespace(compute_capability=capability)

    assert resolve_dtype("auto") == "float32", "the tests run on a CPU"
    assert resolve_dtype("bfloat16") == "bfloat16"
    for capabilities, expected in (
        (["9.0", "8.0"], "bfloat16"), (["9.0", "7.5"], "float32"), (["12.0"], "bfloat16"),
        (["gfx90a"], "float32"),
    ):  # fmt: skip
        monkeypatch.setattr(jax, "local_devices", lambda c=capabilities: list(map(make_gpu, c)))
        assert resolve_dtype("auto") == expected, capabilities
    assert get_compute_capability(make_gpu("12.1")) == (12, 1)
    assert get_compute_capability(object()) == (0, 0)


def test_replicated_arrays_have_the_sharding_of_pmaps_results():
    # Otherwise, the second step would be compiled again for the result of the first step.
    devices = Devices(2)
    step = devices.compile(lambda state, arrays: state + jax.lax.pmean(arrays.sum(), "devices"))
    state = devices.replicate(np.float32(0))
    after = step(state, devices.shard(np.ones(4, np.float32)))
    assert after.sharding == state.sharding and devices.fetch(after) == 2


def test_batches_that_cannot_be_divided_and_missing_devices_are_refused():
    Devices(4).check_batch("vqgan", 8)
    with pytest.raises(
        UserError, match="--vqgan.batch-size 6 cannot be divided equally among 4 devices"
    ):
        Devices(4).check_batch("vqgan", 6)
    Devices(4).check_batch("prior", 24, 3)
    with pytest.raises(UserError, match="4 devices with 4 --prior.micro-batches each; .* of 16"):
        Devices(4).check_batch("prior", 24, 4)
    with pytest.raises(UserError, match="--devices is 9, but the number of cpu devices is 4"):
        Devices(9)


@pytest.fixture(scope="module")
def state_and_batch():
    """The state after 100 steps with the adversarial loss, and the next batch."""
    config = load_config("mnist_tiny", OVERRIDES)
    devices = Devices(1)
    stage = VQGANStage(config, devices)
    state = stage.init(jax.random.key(0))
    feed, _ = stage.build_feeds()
    for step in range(100):
        state, _ = stage.train_step(state, feed.batch(step))
    images, _ = gather_batch(feed.batch(100).arrays)
    return devices.fetch(state), np.asarray(images)


@pytest.mark.slow
def test_several_devices_take_the_same_step_as_one(state_and_batch):
    state, images = state_and_batch
    # LeCam is on, so that the test compares every kind of state.
    config = load_config("mnist_tiny", OVERRIDES | {"vqgan.lecam_weight": 0.1})
    discriminator = state.nets["discriminator"]
    averages = {"real": np.float32(0.1), "fake": np.float32(-0.1)}
    discriminator = discriminator.replace(extra=discriminator.extra | {"lecam": averages})
    nets = {"generator": state.nets["generator"], "discriminator": discriminator}
    results = {}
    for count in (1, 2, 4):
        devices = Devices(count)
        networks = VQGANObjective.build(config, devices.axis_name)
        step = devices.compile(
            lambda nets, images, networks=networks: networks.compute_gradients(
                nets["generator"], nets["discriminator"], to_float(images), {}, True, 100
            )
        )
        out = step(devices.replicate(nets), devices.shard(images))
        results[count] = devices.fetch(out)
    assert results[1].metrics["adaptive_weight"] > 0
    for count in (2, 4):
        golden.assert_trees_close(results[count], results[1], f"{count} devices ", 1e-5, 1e-6)


def test_augmentation_does_not_depend_on_the_devices():
    data = DataConfig(name="synthetic", image_size=16, random_crop=True, mirror=True)
    split = datasets.load(data).train
    augmented = {}
    for count in (1, 4):
        devices = Devices(count)

        def augment_batch(step, arrays):
            keys = make_example_keys(7, AUGMENTATION, step, arrays["place"])
            return augment(gather_batch(arrays)[0], keys, data)

        feed = ResidentFeed(split, 32, 7, devices)
        out = devices.compile(augment_batch)(devices.replicate(np.int32(3)), feed.batch(3).arrays)
        augmented[count] = devices.gather(out)
    assert augmented[1].shape == (32, 16, 16, 1)
    np.testing.assert_array_equal(augmented[4], augmented[1])


@pytest.mark.slow
def test_the_command_logs_the_same_rows_on_any_number_of_devices(tmp_path):
    rows = {}
    for count in (1, 2, 4):
        workdir = tmp_path / str(count)
        status, _, err = commands.run(
            "train_vqgan.py", "--config", "mnist_tiny", "--vqgan.batch-size", 16,
            "--vqgan.steps", 4, "--vqgan.discriminator-start", 0, "--vqgan.adaptive-weight",
            "--workdir", workdir, "--devices", count, devices=4,
        )  # fmt: skip
        assert status == 0, err
        lines = (workdir / "metrics" / "vqgan.jsonl").read_text().splitlines()
        rows[count] = [json.loads(line) for line in lines]
    assert len(rows[1]) == 5 and rows[1][0]["adaptive_weight"] > 0
    for count in (2, 4):
        for row, expected in zip(rows[count], rows[1], strict=True):
            assert row.keys() == expected.keys()
            assert row.pop("split") == expected["split"]
            for key in row:
                assert row[key] == pytest.approx(expected[key], rel=2e-3), key


SMALL = small_runs.EVERYTHING | {"vqgan__steps": 4}


@pytest.fixture(scope="module")
def small_workdir(tmp_path_factory):
    """The folder of a small run on one device."""
    folder = tmp_path_factory.mktemp("small")
    small_runs.train(folder, **SMALL)
    return folder


on_several_devices = pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 4])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_small_run_logs_the_same_rows_on_several_devices(small_workdir, tmp_path, count):
    small_runs.train(tmp_path, devices=count, **SMALL)
    expected = small_runs.read_rows(small_workdir)
    assert len(expected) == 5 and expected[0]["adaptive_weight"] > 0
    small_runs.assert_rows_close(small_runs.read_rows(tmp_path), expected, 2e-3)


@pytest.mark.slow
@on_several_devices
def test_a_small_run_takes_the_same_step_on_several_devices(small_workdir, count):
    """The steps start from the same checkpoint, so that a difference of Adam's first moments is a
    difference of the gradients."""
    results = {}
    for current in (1, count):
        stage = small_runs.build_vqgan_stage(small_runs.make_config(None, devices=current, **SMALL))
        store = Store(small_workdir, "vqgan")
        template = stage.init(jax.random.key(0))
        state = store.restore(template, stage.config, (), ())
        feed, _ = stage.build_feeds()
        state = copy_buffers(stage.devices.replicate(state))
        state, metrics = stage.train_step(state, feed.batch(4))
        feed.close()
        moments = {
            name: optax.tree_utils.tree_get(net.opt_state, "mu") for name, net in state.nets.items()
        }
        extra = {name: net.extra for name, net in state.nets.items()}
        results[current] = stage.devices.fetch((metrics, moments, extra, state.step))
        (metrics,) = results[current][0].unpack()
    assert metrics["adaptive_weight"] > 0 and results[1][3] == 5
    golden.assert_trees_close(results[count], results[1], f"{count} devices ", 1e-5, 1e-6)
