import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config
from taming_jax.config.quantizers import FSQConfig
from taming_jax.errors import UserError
from tests.models.quantizers import reference
from tests.models.quantizers.reference import fixed, make_quantizer


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (4, 3), (7,), (256,)])
def test_values_and_gradients_equal_the_definition(levels):
    quantizer = make_quantizer("fsq", int(np.prod(levels)), levels=levels)

    def quantize(z, params):
        vectors, indices, place = [], 0, 1
        for i, level in enumerate(levels):
            half = (level - 1) * 1.001 / 2
            offset = 0.5 if level % 2 == 0 else 0.0
            bounded = jnp.tanh(z[..., i] + np.arctanh(offset / half)) * half - offset
            rounded = jnp.round(fixed(bounded))
            vectors.append((bounded + rounded - fixed(bounded)) / (level // 2))
            indices += (rounded + level // 2).astype(int) * place
            place *= level
        return jnp.stack(vectors, -1), indices, jnp.zeros(indices.shape)

    reference.compare(quantizer, quantize, scale=3)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (4, 3), (256,), (255,)])
def test_every_code_is_reached_and_zero_stays_zero(levels):
    size = int(np.prod(levels))
    quantizer = make_quantizer("fsq", size, levels=levels)
    codes = quantizer.apply({}, jnp.arange(size), method="lookup")
    assert len({tuple(code) for code in codes.tolist()}) == size and jnp.abs(codes).max() == 1
    # Latents that the bound maps to the codes.
    half, offset = (quantizer.levels - 1) * 1.001 / 2, (quantizer.levels % 2 == 0) / 2
    z = np.arctanh((codes * (quantizer.levels // 2) + offset) / half) - np.arctanh(offset / half)
    quantized = quantizer.apply({}, jnp.float32(z)[None, None])
    np.testing.assert_array_equal(quantized.indices[0, 0], np.arange(size))
    np.testing.assert_array_equal(quantizer.apply({}, jnp.zeros((1, 1, 1, len(levels)))).vectors, 0)
    extreme = quantizer.apply({}, jnp.full((1, 1, 1, len(levels)), 1e9))
    assert extreme.indices.item() == size - 1


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (64, (8, 8)), (128, (16, 8)), (512, (8, 8, 8)), (1000, (8, 5, 5, 5)), (1024, (16, 8, 8)),
        (16384, (16, 16, 8, 8)), (127, (127,)), (3, (3,)),
    ],
)  # fmt: skip
def test_the_default_levels_multiply_to_the_size_of_the_codebook(size, levels):
    assert FSQConfig().resolve_levels(size) == levels
    assert make_quantizer("fsq", size).num_codes == size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"vqgan.fsq.levels": (64, 2)},
            "levels is 64 2; give one number per dimension, each from 3",
        ),
        ({"vqgan.fsq.levels": ()}, "levels is empty; give"),
        ({"vqgan.fsq.levels": (8, 5, 5, 5)}, "8 5 5 5 give 1000 codes, but .* is 128"),
        ({"vqgan.code_dim": 8}, "code-dim has no effect on the quantizer fsq"),
        ({"vqgan.fsq.levels": (300,)}, "levels is 300; give"),
        ({"vqgan.codebook_size": 2}, "codebook-size 2 is not a product of numbers from 5 to 256"),
        ({"vqgan.codebook_size": 1009}, "codebook-size 1009 is not a product"),
    ],
)
def test_levels_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("mnist_tiny", {"vqgan.quantizer": "fsq"} | overrides)
