import jax
import jax.numpy as jnp
import numpy as np

from taming_jax.interop.imports import Part, read_networks
from taming_jax.weights.layout import map_parameter


def test_networks_are_float32_for_every_dtype_of_the_file(tmp_path):
    weight = np.arange(6).reshape(2, 3) / 8
    shapes = {"net": {"dense": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}}

    def build_layout(paths):
        return {path: map_parameter(".".join(path[:-1]), path[-1]) for path in paths}

    for dtype in (np.float16, jnp.bfloat16, np.float64):
        arrays = {"a.dense.weight": weight.astype(dtype)}
        part = Part(
            tmp_path / "m.ckpt", arrays, {"net": (build_layout, "a.")}, lambda _: False, "x.yaml"
        )
        kernel = read_networks(part, shapes)["net"]["dense"]["kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(kernel, weight.T)
