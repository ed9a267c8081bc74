import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.schema import PriorConfig
from taming_jax.interop.compvis import build_gpt_layout
from taming_jax.priors.autoregressive import GPT
from taming_jax.priors.transformer import rotate
from tests import golden

MODERN = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "qk_norm": True}


def make_small_model(**settings):
    settings = {"layers": 2, "heads": 2, "width": 16, "dropout": 0.0, **settings}
    dtype = settings.pop("dtype", jnp.float32)
    model = GPT(11, 3, (3, 4), PriorConfig(**settings), dtype)
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 15)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, : model.num_positions])["params"]
    # Larger weights than the initial ones make the logits depend strongly on the earlier tokens.
    return model, jax.tree.map(lambda p: 8 * p if p.ndim > 1 else p, params), tokens


def test_the_gpt_reproduces_the_official_one():
    recorded = golden.load("compvis_gpt")
    model = GPT(64, 0, (4, 6), PriorConfig(layers=2, heads=4, width=32))
    ours = jax.eval_shape(model.init, jax.random.key(0), recorded["tokens"])["params"]
    params = golden.convert_state_dict(
        build_gpt_layout, ours, golden.select_prefix(recorded, "sd/")
    )
    logits = jax.jit(model.apply)({"params": params}, recorded["tokens"])
    golden.assert_close(logits, recorded["logits"], "logits")


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_no_position_depends_on_a_later_one(settings):
    model, params, tokens = make_small_model(**settings)
    apply = jax.jit(model.apply)
    logits = apply({"params": params}, tokens)
    for position in (1, 6, 11):
        changed = tokens.at[:, position].set((tokens[:, position] + 1) % 11)
        other = apply({"params": params}, changed)
        np.testing.assert_allclose(other[:, :position], logits[:, :position], atol=1e-6)
        assert (np.abs(other[:, position:] - logits[:, position:]).max((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("settings", [{}, MODERN, {"remat": True}], ids=["gpt2", "modern", "remat"])
def test_decoding_with_a_cache_equals_a_forward_pass_over_the_whole_sequence(settings):
    model, params, tokens = make_small_model(**settings)
    expected = jax.jit(model.apply)({"params": params}, tokens)
    decode = jax.jit(functools.partial(model.apply, method=GPT.decode))
    cache, position = model.init_cache(4, 12), 0
    for size in (5, 1, 1, 5):
        part = tokens[:, position : position + size]
        logits, cache = decode({"params": params}, part, cache, position)
        golden.assert_close(logits, expected[:, position : position + size], f"{position}", 1e-4)
        position += size


def test_rotary_positions_depend_only_on_differences():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(query_position, key_position):
        rotated = rotate(q, jnp.array([query_position])), rotate(k, jnp.array([key_position]))
        return float((rotated[0] * rotated[1]).sum())

    assert score((2, 3), (1, 5)) == pytest.approx(score((7, 1), (6, 3)), rel=1e-4)
    assert abs(score((2, 3), (1, 5)) - score((2, 3), (2, 5))) > 1e-3
    assert abs(score((2, 3), (1, 5)) - score((2, 3), (1, 4))) > 1e-3
    assert score((0, 0), (0, 0)) == pytest.approx(float((q * k).sum()), rel=1e-5)


def test_teacher_forcing_puts_the_class_before_the_codes():
    model, _, _ = make_small_model()
    codes = jnp.arange(12)[None] % 11
    tokens = model.shift_right(jnp.array([2]), codes)
    assert tokens.tolist() == [[13, *codes[0, :-1].tolist()]]
    assert model.shift_right(jnp.array([3]), codes)[0, 0] == model.null_token


def test_the_dropout_of_an_example_does_not_depend_on_its_batch():
    model, params, tokens = make_small_model(dropout=0.5)
    keys = jax.random.split(jax.random.key(5), 4)
    apply = jax.jit(model.train_logits)
    together = apply(params, tokens, keys)
    alone = apply(params, tokens[2:3], keys[2:3])
    np.testing.assert_allclose(alone, together[2:3], atol=1e-5)
    repeated = apply(params, tokens[:1].repeat(2, 0), keys[:2])
    assert np.abs(repeated[0] - repeated[1]).max() > 1e-2, "every example has its own mask"


def test_recomputing_activations_does_not_change_gradients():
    keys = jax.random.split(jax.random.key(5), 4)
    gradients = []
    for remat in (False, True):
        model, params, tokens = make_small_model(dropout=0.2, remat=remat)
        compute_gradient = jax.jit(
            jax.grad(lambda p, m=model, t=tokens: (m.train_logits(p, t, keys) ** 2).mean())
        )
        gradients.append(compute_gradient(params))
    golden.assert_trees_close(gradients[1], gradients[0], "gradient ", 1e-4)


def test_bfloat16_computes_logits_in_float32():
    model, params, tokens = make_small_model(dtype=jnp.bfloat16)
    logits = jax.jit(model.apply)({"params": params}, tokens)
    assert logits.dtype == jnp.float32
    exact = jax.jit(make_small_model()[0].apply)({"params": params}, tokens)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
