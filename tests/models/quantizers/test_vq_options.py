"""The options of `vq` and `ema`: rotation trick, entropy penalty, and restarts of unused codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.errors import UserError
from taming_jax.models.quantizers import entropy, interface
from tests import golden
from tests.models.quantizers import reference
from tests.models.quantizers.reference import fixed, make_quantizer, make_training, nearest, unit


def rotate_exactly(z, codes):
    """Applies the matrix that rotates and scales each latent to its code (arXiv 2410.06424)."""
    start, end = unit(fixed(z)), unit(fixed(codes))
    middle = unit(start + end)
    rotation = jnp.eye(z.shape[-1]) - 2 * middle[..., :, None] * middle[..., None, :]
    rotation += 2 * end[..., :, None] * start[..., None, :]
    scale = jnp.linalg.norm(fixed(codes), axis=-1) / jnp.linalg.norm(fixed(z), axis=-1)
    return scale[..., None] * jnp.einsum("...ij,...j->...i", rotation, z)


@pytest.mark.parametrize("l2_normalise", [False, True])
def test_the_rotation_trick_equals_the_matrix(l2_normalise):
    quantizer = make_quantizer("vq", 16, 5, rotation_trick=True, l2_normalise=l2_normalise)

    def quantize(z, params):
        codes = params["codebook"]
        if l2_normalise:
            z, codes = unit(z), unit(codes)
        vectors, indices = nearest(z, codes)
        loss = ((fixed(z) - vectors) ** 2 + 0.25 * (z - fixed(vectors)) ** 2).mean(-1)
        return rotate_exactly(z, vectors), indices, loss

    reference.compare(quantizer, quantize)


def test_the_rotation_is_finite_for_zero_and_opposite_vectors():
    z = jnp.array([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    vectors = jnp.array([[1.0, 0.0], [-1.0, -2.0], [0.0, 0.0]])
    value, pullback = jax.vjp(lambda z: interface.rotate(z, vectors), z)
    np.testing.assert_array_equal(value, vectors)
    assert np.isfinite(pullback(jnp.ones_like(z))[0]).all()


def test_the_entropy_penalty_equals_its_definition_and_applies_only_in_training():
    settings = {"entropy_weight": 0.7, "diversity_weight": 0.4, "entropy_temperature": 0.5}
    quantizer = make_quantizer("vq", 16, 5, **settings)

    def quantize(z, params):
        codes = params["codebook"]
        vectors, indices = nearest(z, codes)
        loss = ((fixed(z) - vectors) ** 2 + 0.25 * (z - fixed(vectors)) ** 2).mean(-1)
        distances = jnp.square(z[..., None, :] - codes).sum(-1)
        loss += reference.penalty(-distances / 0.5, 0.7, 0.4)
        return z + fixed(vectors - z), indices, loss

    _, _, loss = reference.compare(quantizer, quantize, training=make_training())
    z, params, _ = reference.make_arrays(quantizer)
    plain = quantizer.apply({"params": params}, z)
    assert plain.statistics is None and (plain.loss != loss).all()


def test_too_large_an_entropy_penalty_is_refused_with_the_number(monkeypatch):
    monkeypatch.setattr(entropy, "MAX_BYTES", 1000)
    quantizer = make_quantizer("vq", 16, 5, entropy_weight=0.1)
    z, params, _ = reference.make_arrays(quantizer)
    with pytest.raises(UserError, match="quantizer vq needs .* 72 latents times 16 codes"):
        quantizer.apply({"params": params}, z, make_training())


def test_drawn_latents_are_different_ones_of_the_batch_on_any_parts_of_it():
    z = jnp.arange(6 * 3 * 4 * 2, dtype=jnp.float32).reshape(6, 3, 4, 2)
    training = make_training()
    drawn = interface.draw_latents(z, training, 50, 6)
    rows = {tuple(row) for row in np.asarray(drawn).tolist()}
    assert len(rows) == 50 and rows < {tuple(row) for row in z.reshape(-1, 2).tolist()}
    parts = [
        interface.draw_latents(z[part], training._replace(place=training.place[part]), 50, 6)
        for part in (np.array([4, 1]), np.array([0, 5, 2, 3]))
    ]
    np.testing.assert_array_equal(parts[0] + parts[1], drawn)
    many = np.asarray(interface.draw_latents(z, training, 100, 6))
    np.testing.assert_array_equal(many[72:], many[:28])


@pytest.mark.parametrize("l2_normalise", [False, True])
def test_codes_that_are_unused_for_some_steps_are_replaced_by_latents(l2_normalise):
    quantizer = make_quantizer("vq", 4, 5, restart_after=3, l2_normalise=l2_normalise)
    z, params, _ = reference.make_arrays(quantizer)
    state = quantizer.init_state()
    candidates = quantizer.apply({"params": params}, z, make_training()).statistics["candidates"]
    used = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 5, 0], [1, 0, 0, 0]], np.float32)
    unused, restarted = [], []
    for counts in used:
        statistics = {"counts": jnp.asarray(counts), "candidates": candidates}
        updated, state = quantizer.update(params, state, statistics)
        unused.append(state["unused_steps"].tolist())
        changed = (updated["codebook"] != params["codebook"]).any(-1)
        restarted.append(changed.tolist())
        np.testing.assert_array_equal(updated["codebook"][changed], candidates[changed])
    assert unused == [[0, 0, 1, 1], [0, 1, 2, 2], [0, 2, 0, 0], [0, 0, 1, 1]]
    assert restarted == [
        [False] * 4,
        [False] * 4,
        [False] * 3 + [True],
        [False, True, False, False],
    ]
    latents = (z / np.linalg.norm(z, axis=-1, keepdims=True)) if l2_normalise else z
    for row in candidates:
        assert np.abs(latents.reshape(-1, 5) - row).max(-1).min() < 1e-6
    golden.assert_close(
        quantizer.apply({"params": {"codebook": candidates}}, jnp.arange(4), method="lookup"),
        candidates, "restarted codes", 1e-6,
    )  # fmt: skip
