import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.schema import PriorConfig
from taming_jax.priors import transformer
from taming_jax.priors.autoregressive import GPT
from taming_jax.priors.transformer import supports_cudnn
from tests import golden


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), "bfloat16", 64, True),
        ((9, 0), "float32", 64, False),
        ((7, 5), "bfloat16", 64, False),
        ((8, 0), "bfloat16", 136, False),
        ((9, 0), "bfloat16", 136, True),
        ((9, 0), "bfloat16", 20, False),
        ((0, 0), "bfloat16", 64, False),
    ],
)
def test_cudnn_needs_a_gpu_half_precision_and_a_suitable_head(
    monkeypatch, capability, dtype, head_dim, expected
):
    monkeypatch.setattr(transformer, "get_compute_capability", lambda device: capability)
    assert supports_cudnn(jnp.dtype(dtype), head_dim) is expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jaxs_attention_gives_the_logits_and_gradients_of_the_plain_one(monkeypatch, dtype):
    """cuDNN needs a GPU. On a CPU, JAX's own implementation stands for it, with the same call."""
    settings = PriorConfig(layers=2, heads=2, width=32, dropout=0.2)
    model = GPT(11, 3, (3, 4), settings, jnp.dtype(dtype))
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 15)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda p: 8 * p if p.ndim > 1 else p, params)
    keys = jax.random.split(jax.random.key(2), 4)

    def compute(params):
        logits = model.train_logits(params, tokens, keys)
        return jnp.square(logits).mean(), logits

    results = [jax.jit(jax.grad(compute, has_aux=True))(params)]
    attention, calls = jax.nn.dot_product_attention, []

    def attend_in_xla(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        calls.append(q.shape)
        return attention(q, k, v, **options)

    monkeypatch.setattr(transformer, "supports_cudnn", lambda dtype, head_dim: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend_in_xla)
    results.append(jax.jit(jax.grad(compute, has_aux=True))(params))
    assert calls == [(4, 12, 2, 16)] * 2
    tolerance = 1e-4 if dtype == "float32" else 0.05
    golden.assert_trees_close(results[1], results[0], "result ", tolerance)


@pytest.mark.slow
def test_attention_dropout_and_decoding_use_the_plain_attention(monkeypatch):
    settings = PriorConfig(layers=1, heads=2, width=16, attention_dropout=0.5)
    model, tokens = GPT(11, 3, (3, 4), settings), jnp.zeros((2, 12), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    monkeypatch.setattr(transformer, "supports_cudnn", lambda dtype, head_dim: True)
    monkeypatch.setattr(transformer, "attend_with_cudnn", None)
    keys = jax.random.split(jax.random.key(2), 2)
    assert model.train_logits(params, tokens, keys).shape == (2, 12, 11)
    cache = model.init_cache(2, 12)
    decode = functools.partial(model.apply, method=GPT.decode)
    logits, _ = decode({"params": params}, tokens[:, :1], cache, 0)
    assert np.isfinite(logits).all()
