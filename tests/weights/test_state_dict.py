import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as numpy_file
from safetensors.flax import save_file

from taming_jax.errors import UserError
from taming_jax.weights.state_dict import open_state_dict
from tests.weights.torch_writer import write_tensors


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


def test_arrays_of_an_unsupported_dtype_are_left_out(tmp_path, capsys):
    arrays = {"x": jnp.ones(3, jnp.float8_e4m3fn), "y": jnp.ones(3)}
    save_file(arrays, tmp_path / "M.SAFETENSORS")
    assert list(open_state_dict(tmp_path / "M.SAFETENSORS")[0]) == ["y"]
    assert "Left out, since NumPy lacks their types: x." in capsys.readouterr().out


def test_a_missing_or_incomplete_safetensors_file_is_reported(tmp_path):
    file = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="there is no file"):
        open_state_dict(file)
    save_file({"x": jnp.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        open_state_dict(file)


def write(file, content):
    write_tensors(file, content)
    return file


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix):
    file = write(tmp_path / "m.pt", {"model": {f"{prefix}encoder.weight": np.ones(2, np.float32)}})
    assert list(open_state_dict(file)[0]) == ["encoder.weight"]
    nested = write(tmp_path / "n.pt", {"model": {"decoder._orig_mod.weight": np.ones(2)}})
    assert list(open_state_dict(nested)[0]) == ["decoder.weight"]


WEIGHTS = {"a.weight": np.float32([1, 2]), "a.count": np.array([3])}
AVERAGES = {"model_ema.aweight": np.float32([5, 6]), "model_ema.decay": np.float32([0.9])}


@pytest.mark.parametrize(
    ("content", "averaged"),
    [
        ({"state_dict": WEIGHTS | AVERAGES}, True),
        ({"model": WEIGHTS, "ema": {"a.weight": np.float32([5, 6])}}, True),
        ({"model": WEIGHTS}, False),
    ],
)
def test_moving_averages_are_used_unless_the_weights_are_asked_for(
    tmp_path, capsys, content, averaged
):
    file = write(tmp_path / "m.ckpt", content)
    arrays, _ = open_state_dict(file)
    assert sorted(arrays) == sorted(WEIGHTS)
    assert arrays["a.weight"].tolist() == ([5, 6] if averaged else [1, 2])
    assert ("Using the exponential moving average" in capsys.readouterr().out) == averaged
    arrays, _ = open_state_dict(file, "model")
    assert sorted(arrays) == sorted(WEIGHTS) and arrays["a.weight"].tolist() == [1, 2]
    assert ("Using the weights" in capsys.readouterr().out) == averaged
    if averaged:
        assert open_state_dict(file, "ema")[0]["a.weight"].tolist() == [5, 6]
    else:
        with pytest.raises(UserError, match="does not have the moving average"):
            open_state_dict(file, "ema")


def test_moving_averages_in_other_forms(tmp_path, capsys):
    average = np.float32([5, 6])
    wrapped = {"module.a.weight": np.float32([1, 2]), "module.model_ema.aweight": average}
    for content in (
        {"state_dict": wrapped},
        {
            "state_dict": {
                "module.a.weight": np.float32([1, 2]),
                "model_ema.modulea" + "weight": average,
            }
        },
        {"model": {"a.weight": np.float32([1, 2])}, "ema_state_dict": {"a.weight": average}},
        {"model": {"a.weight": np.float32([1, 2])}, "model_ema": {"module.a.weight": average}},
        {"ema": {"a.weight": average}},
    ):
        arrays, _ = open_state_dict(write(tmp_path / "m.ckpt", content))
        assert list(arrays) == ["a.weight"] and arrays["a.weight"].tolist() == [5, 6]
        assert "exponential moving average (EMA)" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not have the weights themselves"):
        open_state_dict(tmp_path / "m.ckpt", "model")
    write(tmp_path / "m.ckpt", {"state_dict": AVERAGES})
    with pytest.raises(UserError, match="has no state dict"):
        open_state_dict(tmp_path / "m.ckpt")
