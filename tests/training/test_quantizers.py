"""The quantizers in the training step of stage 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.evaluation.report import evaluate
from taming_jax.interop.compvis_export import export_run
from taming_jax.models.quantizers import QUANTIZERS
from taming_jax.parallel.devices import Devices
from taming_jax.run import load_run
from taming_jax.training.state import Net
from taming_jax.training.vqgan_step import Keys
from tests import golden, small_runs
from tests.small_networks import make_small_networks, make_small_state

ALL_OPTIONS = {
    "vq": {"restart_after": 1, "rotation_trick": True, "entropy_weight": 0.1},
    "ema": {"restart_after": 1},
}


def take_step(name, count, parts):
    """Returns the gradients of a step before the discriminator starts on `count` devices with
    `parts` micro-batches each, and the generator after the quantizer's update."""
    devices = Devices(count)
    overrides = {f"{name}.{key}": value for key, value in ALL_OPTIONS.get(name, {}).items()}
    overrides |= {"quantizer": name, "batch_size": 16}
    networks = make_small_networks(overrides, parts, devices.axis_name)
    _, discriminator, images = make_small_state()
    params = jax.jit(networks.generator.init)(jax.random.key(3), images)["params"]
    generator = Net(params, (), networks.generator.quantizer.init_state())
    codes = jax.random.key_data(jax.random.split(jax.random.key(4), 16))

    def step(nets, arrays):
        images, codes, place = arrays
        keys = Keys(codes=jax.random.wrap_key_data(codes), place=place)
        gradients = networks.compute_gradients(
            *nets, images, {}, False, 0, keys, jax.random.key(6), 0.3
        )
        return gradients, networks.update_quantizer(nets[0], gradients.statistics)

    arrays = devices.shard((images, codes, jnp.arange(16)))
    return devices.fetch(
        devices.compile(step)(devices.replicate((generator, discriminator)), arrays)
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "ema" else pytest.mark.slow) for name in QUANTIZERS],
)
def test_a_step_is_the_same_on_any_number_of_devices(name):
    expected, expected_generator = take_step(name, 1, 2)
    unused = expected.statistics["counts"] == 0
    if "candidates" in expected.statistics:
        restarted = expected_generator.params["quantizer"]["codebook"][unused]
        np.testing.assert_allclose(restarted, expected.statistics["candidates"][unused], rtol=1e-6)
        assert 0 < unused.sum() < 16
    for count in (2, 4) if name != "ema" else (4,):
        result, generator = take_step(name, count, 2)
        np.testing.assert_array_equal(result.statistics["counts"], expected.statistics["counts"])
        golden.assert_trees_close(result, expected, f"{name} on {count}", 1e-5, 1e-6)
        golden.assert_trees_close(generator, expected_generator, f"{name} on {count}", 1e-5, 1e-6)


@pytest.mark.slow
def test_a_killed_run_with_restarts_and_averages_resumes_bit_for_bit(tmp_path):
    # Each step has 512 latents, so that at least half of the codes are unused.
    settings = {
        "vqgan__codebook_size": 1024, "vqgan__quantizer": "ema", "vqgan__ema__restart_after": 2,
        "vqgan__ema__decay": 0.9, "vqgan__steps": 20, "vqgan__checkpoint_every": 8,
        "vqgan__eval_every": 20, "vqgan__discriminator_start": 1.0,
    }  # fmt: skip
    small_runs.train(tmp_path / "whole", **settings)
    with pytest.raises(small_runs.Killed):
        small_runs.train(tmp_path / "killed", on_step=small_runs.kill_at(13), **settings)
    small_runs.train(tmp_path / "killed", **settings)
    small_runs.assert_same_run(tmp_path / "killed", tmp_path / "whole", 20)
    arrays = small_runs.read_arrays(tmp_path / "whole", 20)
    generator = ("nets", "generator")
    codebooks = [arrays[*generator, x, "quantizer", "codebook"] for x in ("params", "ema")]
    np.testing.assert_allclose(*codebooks, atol=1e-5)  # the EMA follows restarts and averages
    state = ("nets", "generator", "extra")
    assert set(arrays[*state, "unused_steps"]) == {0, 1} and arrays[*state, "usage"].max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_works_from_training_to_samples(name, tmp_path):
    """Both stages, figures, tokens, checkpoints, evaluation, completion, and `init_from`."""
    settings = {"vqgan__quantizer": name, "vqgan__steps": 3, "vqgan__ema_decay": 0.9}
    settings |= {"prior__steps": 3, "vqgan__micro_batches": 2, "vqgan__perceptual_weight": 0.0}
    settings |= {"data__image_size": 16, "vqgan__multipliers": (1, 1)}
    small_runs.train(tmp_path / "run", draw=True, **settings)
    small_runs.train(tmp_path / "run", "prior", draw=True, **settings)
    figures = {file.name for file in (tmp_path / "run" / "figures").iterdir()}
    assert {"codebook.png", "codebook_usage.png", "random_latents.png"} <= figures
    run = load_run(tmp_path / "run")
    images = run.load_data().validation.images[:8]
    codes = run.encode(images)
    assert codes.shape == (8, 8, 8) and codes.max() < 16
    np.testing.assert_array_equal(to_uint8(run.decode(codes)), run.reconstruct(images))
    assert np.asarray(run.sample([0, 1])).shape[1:] == (16, 16, 1)
    report = evaluate(run, features="vgg", images=8, samples=8)
    assert len(report["reconstruction"]["code_counts"]) == 16
    small_runs.train(
        tmp_path / "next", **settings | {"vqgan__init_from": str(tmp_path / "run"), "seed": 1}
    )
    before, after = (small_runs.read_arrays(tmp_path / x, 3) for x in ("run", "next"))
    assert before.keys() == after.keys()
    if name not in ("vq", "gumbel"):
        with pytest.raises(UserError, match=f"has no quantizer {name}"):
            export_run(tmp_path / "run", tmp_path / "out.ckpt", "vqgan")
