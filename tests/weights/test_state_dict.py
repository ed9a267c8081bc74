import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as numpy_file
from safetensors.flax import save_file

from taming_jax.errors import UserError
from taming_jax.weights.state_dict import open_state_dict


def test_safetensors_of_any_float_are_read(tmp_path):
    values = np.array([1.0, -0.5, 3e38], np.float32)
    arrays = {"whole": jnp.array(values), "brain": jnp.array(values, jnp.bfloat16)}
    save_file(arrays, tmp_path / "m.safetensors", {"global_step": "7"})
    loaded, rest = open_state_dict(tmp_path / "m.safetensors")
    assert rest == {"global_step": "7"} and sorted(loaded) == ["brain", "whole"]
    np.testing.assert_array_equal(loaded["whole"], values)
    np.testing.assert_array_equal(loaded["brain"], arrays["brain"])


def test_safetensors_keep_their_types(tmp_path):
    arrays = {"double": np.array([1e300]), "count": np.array([2**40])}
    numpy_file.save_file(arrays, tmp_path / "m.safetensors")
    loaded, _ = open_state_dict(tmp_path / "m.safetensors")
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_a_type_that_cannot_be_read_is_a_sentence(tmp_path):
    save_file({"x": jnp.ones(3, jnp.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        open_state_dict(tmp_path / "m.safetensors")


def test_a_safetensors_file_that_is_not_whole_is_a_sentence(tmp_path):
    file = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="there is no file"):
        open_state_dict(file)
    save_file({"x": jnp.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        open_state_dict(file)
