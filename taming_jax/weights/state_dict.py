"""State dicts in files, PyTorch's (`.ckpt`, `.pt`, `.pth`) and safetensors, and checks of what they
hold."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taming_jax.errors import UserError, say
from taming_jax.files import whole
from taming_jax.weights.torch_file import open_tensors

StateDict = dict[str, np.ndarray]


def open_state_dict(file: Path) -> tuple[StateDict, dict[str, Any]]:
    """The arrays of a file by their names, and what else it holds. In a file of PyTorch's they are
    in its `ema`, `state_dict` or `model`, or all there is.

    Raises UserError for a file that is missing, damaged, or holds no arrays.
    """
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    content = open_tensors(file)
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no state dict.")
    # As Lightning, LlamaGen and DeepSpeed call it.
    keys = [k for k in ("ema", "state_dict", "model", "module") if isinstance(content.get(k), dict)]
    inner = content[keys[0]] if keys else content
    arrays = {str(name): x for name, x in inner.items() if isinstance(x, np.ndarray)}
    if not arrays:
        raise UserError(f"{file} holds no state dict.")
    if keys[:1] == ["ema"]:
        say(f"{file} holds a moving average of its weights, which is used.")
    return arrays, {str(k): x for k, x in content.items() if isinstance(x, int | float | str)}


def open_safetensors(file: Path) -> tuple[StateDict, dict[str, Any]]:
    """The arrays of a safetensors file, and its metadata."""
    import safetensors

    try:
        # "numpy" reads every type but bfloat16; "flax" reads that, but turns int64 into int32.
        by_numpy, by_flax = (safetensors.safe_open(file, kind) for kind in ("numpy", "flax"))

        def read(name: str) -> np.ndarray:
            is_bfloat16 = by_numpy.get_slice(name).get_dtype() == "BF16"
            return np.asarray((by_flax if is_bfloat16 else by_numpy).get_tensor(name))

        return {name: read(name) for name in list(by_numpy.keys())}, dict(by_numpy.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is not a safetensors file that can be read ({error}).") from error


def check_kind(file: Path) -> None:
    """UserError for a file that `write_state_dict` cannot write: one of another kind, or a `.ckpt`
    where PyTorch is not installed."""
    if file.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"{file} is neither a .ckpt nor a .safetensors file; name one of these.")
    if file.suffix == ".ckpt" and importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{file}: a .ckpt is written by PyTorch, which is not installed; install it (pip "
            f"install torch), or write {file.with_suffix('.safetensors').name}."
        )


def write_state_dict(
    file: Path, state_dict: Mapping[str, np.ndarray], rest: dict[str, Any]
) -> None:
    """Writes a `.safetensors` file with `rest` as its metadata, or a `.ckpt` as PyTorch Lightning
    writes it. The file appears whole or not at all. Raises OSError."""
    with whole(file) as partial:
        if file.suffix == ".safetensors":
            from safetensors.numpy import save_file

            arrays = {name: np.asarray(x, order="C") for name, x in state_dict.items()}
            save_file(arrays, partial, {key: json.dumps(value) for key, value in rest.items()})
        else:
            import torch

            tensors = {name: torch.from_numpy(np.array(x)) for name, x in state_dict.items()}
            try:
                torch.save({**rest, "state_dict": tensors}, partial)
            except RuntimeError as error:  # as PyTorch has it where a disk is full
                raise OSError(str(error)) from error


def check(
    file: Path,
    found: StateDict,
    expected: Mapping[str, tuple[int, ...]],
    may_be: Callable[[str], bool],
    described: str,
) -> None:
    """UserError where a file lacks an array, holds one that is neither expected nor one that
    `may_be`, or one of another shape than what is `described` makes it."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not may_be(name)]
    if missing or extra:
        parts = [f"it lacks {some(missing)}"] if missing else []
        parts += [f"it holds {some(extra)} besides"] if extra else []
        raise UserError(f"{file} is not what {described} describes: {', and '.join(parts)}.")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{file} is not what {described} describes: {name} is {list(found[name].shape)} in "
                f"the file and {list(shape)} by {described}."
            )


def some(names: Iterable[str]) -> str:
    """The first five of names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
