"""Dataclasses as the plain containers that JSON holds, and back, with their types checked."""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal

from taming_jax.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain containers, as JSON would hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: Any, where: str = "") -> Any:
    """The dataclass that `to_dict` wrote. Settings that are absent keep their defaults; unknown
    ones and values of a wrong type raise UserError."""
    if not isinstance(values, dict):
        raise UserError(f"the setting '{where or 'config'}' must be an object of settings.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"did you mean '{where}{near[0]}'?" if near else "remove it."
        raise UserError(f"there is no setting '{where}{unknown[0]}'; {hint}")
    return kind(**{key: convert(hints[key], value, where + key) for key, value in values.items()})


def convert(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as the type that a field declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, name + ".")
    if origin is types.UnionType and value is None and type(None) in arguments:
        return None
    if origin is types.UnionType:
        return convert(next(a for a in arguments if a is not type(None)), value, name)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            return tuple(convert(k, v, name) for k, v in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"the setting '{name}' cannot be {value!r}.")
