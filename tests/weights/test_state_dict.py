import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as numpy_file
from safetensors.flax import save_file

from taming_jax.errors import UserError
from taming_jax.weights.state_dict import open_state_dict


def test_float32_and_bfloat16_safetensors_are_read(tmp_path):
    values = np.array([1.0, -0.5, 3e38], np.float32)
    arrays = {"full": jnp.array(values), "brain": jnp.array(values, jnp.bfloat16)}
    save_file(arrays, tmp_path / "m.safetensors", {"global_step": "7"})
    loaded, rest = open_state_dict(tmp_path / "m.safetensors")
    assert rest == {"global_step": "7"} and sorted(loaded) == ["brain", "full"]
    np.testing.assert_array_equal(loaded["full"], values)
    np.testing.assert_array_equal(loaded["brain"], arrays["brain"])


def test_arrays_in_safetensors_keep_their_dtypes(tmp_path):
    arrays = {"double": np.array([1e300]), "count": np.array([2**40])}
    numpy_file.save_file(arrays, tmp_path / "m.safetensors")
    loaded, _ = open_state_dict(tmp_path / "m.safetensors")
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_an_unsupported_dtype_is_reported(tmp_path):
    save_file({"x": jnp.ones(3, jnp.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        open_state_dict(tmp_path / "m.safetensors")


def test_a_missing_or_incomplete_safetensors_file_is_reported(tmp_path):
    file = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="there is no file"):
        open_state_dict(file)
    save_file({"x": jnp.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        open_state_dict(file)
