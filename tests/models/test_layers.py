import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.models.layers import BatchNorm, GroupNorm, Upsample
from tests import golden


def test_upsample_doubles_the_size_and_applies_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 6))
    module = Upsample()
    params = module.init(jax.random.key(1), x)["params"]
    kernel = params["conv"]["kernel"]
    params["conv"]["bias"] = jnp.arange(6.0)

    def reference(x, kernel):
        doubled = x.repeat(2, 1).repeat(2, 2)
        return jax.lax.conv_general_dilated(
            doubled, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) + jnp.arange(6.0)

    def upsample(x, kernel):
        conv = params["conv"] | {"kernel": kernel}
        return module.apply({"params": {"conv": conv}}, x)

    golden.assert_close(upsample(x, kernel), reference(x, kernel), "values", 1e-5)
    weights = jax.random.normal(jax.random.key(2), (2, 10, 14, 6))
    for argument in (0, 1):
        gradients = [
            jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), argument)(x, kernel)
            for f in (upsample, reference)
        ]
        golden.assert_close(*gradients, "gradients", 1e-5)


@pytest.mark.parametrize("channels", [6, 32, 64])
def test_group_norm_equals_a_float64_reference(channels):
    x = np.random.default_rng(0).normal(3, 2, (2, 4, 5, channels))
    module = GroupNorm()
    y = module.apply(module.init(jax.random.key(0), x), jnp.asarray(x, jnp.float32))
    groups = channels if channels < 32 else 32
    grouped = x.reshape(2, 20, groups, -1)
    mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    golden.assert_close(y, ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape), "norm", 1e-5)


def test_group_norm_is_accurate_for_faint_detail_on_a_bright_image():
    # Here, the variance computed as mean(x^2) - mean(x)^2 would have no correct digits.
    x = np.random.default_rng(0).normal(1000, 0.5, (1, 16, 16, 32)).astype(np.float32)
    module = GroupNorm()
    y = module.apply(module.init(jax.random.key(0), x), x)
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean((1, 2))) / x64.std((1, 2))
    golden.assert_close(y, expected, "norm", 1e-3)


def test_batch_norm_keeps_the_unbiased_variance():
    x = np.random.default_rng(0).normal(1, 3, (4, 3, 3, 5))
    module = BatchNorm()
    variables = module.init(jax.random.key(0), x, train=False)
    _, updated = module.apply(variables, jnp.asarray(x, jnp.float32), True, mutable=["batch_stats"])
    flat = x.reshape(-1, 5)
    stats = updated["batch_stats"]
    golden.assert_close(stats["mean"], 0.1 * flat.mean(0), "mean", 1e-5)
    golden.assert_close(stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), "variance", 1e-5)
