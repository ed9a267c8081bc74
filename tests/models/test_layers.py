import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.models.layers import BatchNorm, GroupNorm, Upsample, float32_einsum
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


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [6, 32, 64])
def test_group_norm_and_its_gradients_equal_float64_references(channels, silu):
    """The gradients are central differences of a reference in NumPy."""
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(3, 2, (2, 4, 5, channels)), *rng.normal(1, 0.5, (2, channels))
    weights, direction = rng.normal(size=(2, *x.shape))
    groups = channels if channels < 32 else 32

    def normalize(x, scale, bias):
        grouped = x.reshape(2, 20, groups, -1)
        mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
        y = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
        return y / (1 + np.exp(-y)) if silu else y

    module = GroupNorm(silu=silu)

    def apply(x, scale, bias):
        return module.apply({"params": {"scale": scale, "bias": bias}}, x)

    arguments = [jnp.float32(value) for value in (x, scale, bias)]
    y, pullback = jax.vjp(apply, *arguments)
    golden.assert_close(y, normalize(x, scale, bias), "norm", 1e-5)
    gradients = pullback(jnp.float32(weights))
    directions = direction, direction[0, 0, 0], direction[0, 0, 1]
    for i, step in enumerate(directions):
        ends = []
        for sign in (-1, 1):
            moved = [x, scale, bias]
            moved[i] = moved[i] + sign * 1e-5 * step
            ends.append((normalize(*moved) * weights).sum())
        derivative = (ends[1] - ends[0]) / 2e-5
        golden.assert_close((gradients[i] * step).sum(), derivative, f"gradient {i}", 1e-4)


def test_group_norm_in_bfloat16_keeps_its_statistics_in_float32():
    x = jnp.bfloat16(np.random.default_rng(0).normal(50, 2, (2, 16, 16, 8)))
    module = GroupNorm(jnp.bfloat16)
    params = module.init(jax.random.key(0), x)
    y = module.apply(params, x)
    assert y.dtype == jnp.bfloat16
    golden.assert_close(y, GroupNorm().apply(params, x), "norm", 2**-8)


def test_einsums_with_float32_results_round_only_the_cotangent():
    rng = np.random.default_rng(0)
    left, right = (jnp.bfloat16(rng.normal(size=(6, 4))) for _ in range(2))
    cotangent = jnp.float32(rng.normal(size=(6, 6)))
    values, pullback = jax.vjp(lambda *x: float32_einsum("id,jd->ij", *x), left, right)
    exact = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
    assert values.dtype == jnp.float32
    golden.assert_close(values, exact, "values", 1e-6)
    expected = jnp.matmul(jnp.bfloat16(cotangent), right)
    np.testing.assert_array_equal(pullback(cotangent)[0], expected)
    assert (expected != jnp.bfloat16(jnp.matmul(cotangent, jnp.float32(right)))).any()


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


@pytest.mark.parametrize(("mean", "deviation"), [(8, 0.5), (30, 0.05)])
def test_batch_norm_over_devices_equals_that_of_the_whole_batch(mean, deviation):
    # The mean is large compared with the deviation, and the running mean is far from it.
    x = np.random.default_rng(0).normal(mean, deviation, (8, 3, 3, 5)).astype(np.float32)
    alone, shared = BatchNorm(), BatchNorm(axis_name="devices")
    variables = alone.init(jax.random.key(0), x, train=False)

    def apply(module, x):
        return module.apply(variables, x, True, mutable=["batch_stats"])

    expected, expected_stats = apply(alone, x)
    parts = x.reshape(4, 2, 3, 3, 5)
    y, stats = jax.vmap(lambda part: apply(shared, part), axis_name="devices")(parts)
    # The deviation of float32 numbers near the mean has a relative error of about this.
    tolerance = max(1e-5, 4e-7 * mean / deviation)
    golden.assert_close(y.reshape(x.shape), expected, "values", tolerance)
    for name in ("mean", "var"):
        values = stats["batch_stats"][name]
        assert (values == values[0]).all()
        golden.assert_close(values[0], expected_stats["batch_stats"][name], name, 1e-5)
