"""Reads, writes and checks state dicts: PyTorch files (`.ckpt`, `.pt`, `.pth`) and safetensors."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from taming_jax.errors import UserError, say
from taming_jax.storage import atomic_file
from taming_jax.weights.torch_file import open_tensors

StateDict = dict[str, np.ndarray]
Weights = Literal["ema", "model"]
EMA_PREFIX = "model_ema."
SAFETENSORS_DTYPES = (
    "BF16", "BOOL", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64",
)  # fmt: skip


def open_state_dict(file: Path, weights: Weights | None = None) -> tuple[StateDict, dict[str, Any]]:
    """Returns the arrays of a file by name, and its metadata: other numbers and strings.

    In a PyTorch file, the arrays are under the key `ema`, `state_dict`, `model`, `module` or
    `model_state_dict`, or at the top level. `weights` chooses between an exponential moving average
    (EMA) and the weights themselves. Default: the EMA if the file has one. Names lose the prefixes
    of `torch.compile` and data-parallel wrappers. Raises UserError if the file is missing or
    damaged, if a PyTorch file has no arrays, or if it lacks the weights that `weights` selects."""
    if file.suffix.lower() == ".safetensors":
        arrays, metadata = open_safetensors(file)
        ema: StateDict = {}
    else:
        content = open_tensors(file)
        content = content if isinstance(content, Mapping) else {}
        metadata = {
            key: x for key, x in content.items()
            if isinstance(key, str) and isinstance(x, int | float | str)
        }  # fmt: skip
        averages = map(content.get, ("ema", "ema_state_dict", "model_ema"))
        ema = next(filter(None, map(get_arrays, averages)), {})
        # The keys that Lightning, LlamaGen and DeepSpeed use.
        candidates = (
            *map(content.get, ("state_dict", "model", "module", "model_state_dict")),
            content,
        )
        arrays = next(filter(None, map(get_arrays, candidates)), {})
    ema = strip_prefixes(ema) or extract_ema(arrays)
    arrays = strip_prefixes(arrays)
    arrays = {name: x for name, x in arrays.items() if not name.startswith(EMA_PREFIX)}
    if not arrays and not ema:
        raise UserError(f"{file} has no state dict; name a checkpoint with weights.")
    if (weights == "ema" and not ema) or (weights == "model" and not arrays):
        missing = "moving average of the weights" if weights == "ema" else "weights themselves"
        raise UserError(f"{file} does not have the {missing}; leave --weights out.")
    if not arrays:
        say(f"{file} has only an exponential moving average (EMA) of the weights.")
    if not ema or not arrays:
        return arrays or ema, metadata
    used = "model" if weights == "model" else "ema"
    other = "ema" if used == "model" else "model"
    label = {"model": "weights", "ema": "exponential moving average (EMA) of the weights"}[used]
    say(f"Using the {label} in {file}; --weights {other} selects the other weights.")
    return arrays if used == "model" else arrays | ema, metadata


def get_arrays(value: Any) -> StateDict:
    """Returns the arrays of a mapping by name, or an empty dict for other values."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {name: x for name, x in items if isinstance(name, str) and isinstance(x, np.ndarray)}


def strip_prefixes(arrays: StateDict) -> StateDict:
    """Returns arrays without the prefixes that `torch.compile` and data-parallel wrappers add."""
    prefixes = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
    return {prefixes.sub("", name): x for name, x in arrays.items()}


def extract_ema(arrays: StateDict) -> StateDict:
    """Returns, by the names of the weights, the moving average that latent-diffusion's `LitEma`
    stores beside them under names without dots."""
    stripped, ema = strip_prefixes(arrays), {}
    for name, clean in zip(arrays, stripped, strict=True):
        for key in (clean, name):  # without the prefixes of wrappers, or with them
            if (x := stripped.get(EMA_PREFIX + key.replace(".", ""))) is not None:
                ema[clean] = x
    return ema


def open_safetensors(file: Path) -> tuple[StateDict, dict[str, Any]]:
    """Returns the arrays of a safetensors file by name, and its metadata. Raises UserError if the
    file is missing or damaged."""
    import safetensors

    try:
        # "numpy" cannot read bfloat16; "flax" can, but it turns int64 into int32.
        by_numpy, by_flax = (safetensors.safe_open(file, kind) for kind in ("numpy", "flax"))

        def read(name: str) -> np.ndarray:
            return np.asarray((by_flax if kinds[name] == "BF16" else by_numpy).get_tensor(name))

        names = list(by_numpy.keys())
        kinds = {name: by_numpy.get_slice(name).get_dtype() for name in names}
        if other := [name for name in names if kinds[name] not in SAFETENSORS_DTYPES]:
            say(f"Left out, since NumPy lacks their types: {format_names(other)}.")
        arrays = {name: read(name) for name in names if name not in other}
        return arrays, dict(by_numpy.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except (OSError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read as a safetensors file ({error}); download or copy it again."
        ) from error


def check_suffix(file: Path) -> None:
    """Raises UserError for a file that `write_state_dict` cannot write: one with another suffix, or
    a `.ckpt` if PyTorch is not installed."""
    if file.suffix not in (".ckpt", ".safetensors"):
        raise UserError(
            f"{file} is neither a .ckpt nor a .safetensors file; use one of these suffixes."
        )
    if file.suffix == ".ckpt" and importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{file}: writing a .ckpt file needs PyTorch, which is not installed; install it (pip "
            f"install torch), or write {file.with_suffix('.safetensors').name}."
        )


def write_state_dict(
    file: Path, state_dict: Mapping[str, np.ndarray], metadata: dict[str, Any]
) -> None:
    """Writes a `.safetensors` file with metadata, or a `.ckpt` file in the format of PyTorch
    Lightning. The write is atomic. Raises OSError if it fails."""
    with atomic_file(file) as partial:
        if file.suffix == ".safetensors":
            from safetensors.numpy import save_file

            arrays = {name: np.asarray(x, order="C") for name, x in state_dict.items()}
            texts = {k: x if isinstance(x, str) else json.dumps(x) for k, x in metadata.items()}
            save_file(arrays, partial, texts)
        else:
            import torch

            tensors = {name: torch.from_numpy(np.array(x)) for name, x in state_dict.items()}
            try:
                torch.save({**metadata, "state_dict": tensors}, partial)
            except RuntimeError as error:  # PyTorch's error for a full disk
                raise OSError(str(error)) from error


def check_state_dict(
    file: Path,
    state_dict: StateDict,
    shapes: Mapping[str, tuple[int, ...]],
    is_extra: Callable[[str], bool],
    source: str,
) -> None:
    """Raises UserError if a file lacks an array of `shapes`, or has one of another shape, or an
    array that is neither in `shapes` nor extra. `source` names the origin of the shapes in
    messages."""
    missing = [name for name in shapes if name not in state_dict]
    unknown = [name for name in state_dict if name not in shapes and not is_extra(name)]
    if missing or unknown:
        problems = [f"it lacks {format_names(missing)}"] if missing else []
        problems += [f"it has the unknown arrays {format_names(unknown)}"] if unknown else []
        raise UserError(
            f"{file} does not match {source}: {', and '.join(problems)}; check that it is "
            "the right file."
        )
    for name, shape in shapes.items():
        if state_dict[name].shape != shape:
            raise UserError(
                f"{file} does not match {source}: {name} has shape "
                f"{list(state_dict[name].shape)} in the file, but {source} requires {list(shape)}."
            )


def format_names(names: Iterable[str]) -> str:
    """Returns the first five names and the number of the others as a phrase."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
