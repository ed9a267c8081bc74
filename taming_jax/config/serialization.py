"""Converts dataclasses to JSON values and back, with type checks."""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal

from taming_jax.errors import UserError

TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a dataclass to nested dictionaries and lists, as in JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: Any, prefix: str = "") -> Any:
    """Converts the result of `to_dict` back to a dataclass. Absent settings keep their defaults.

    `prefix` precedes the names of settings in messages. Raises UserError if a setting is unknown or
    its value has the wrong type.
    """
    if not isinstance(values, dict):
        name = f"'{prefix.removesuffix('.')}'" if prefix else "the config"
        raise UserError(f"{name} must be an object that maps settings to values.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        matches = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"did you mean '{prefix}{matches[0]}'?" if matches else "remove it."
        raise UserError(f"there is no setting '{prefix}{unknown[0]:.100}'; {hint}")
    return kind(**{key: convert(hints[key], value, prefix + key) for key, value in values.items()})


def convert(hint: Any, value: Any, name: str) -> Any:
    """Converts a JSON value to the type that a field declares, or raises UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, name + ".")
    is_union = origin in (types.UnionType, typing.Union)
    if is_union and value is None and type(None) in arguments:
        return None
    if is_union:
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
    if origin is Literal:
        expected = " or ".join(map(repr, arguments))
    elif origin is tuple:
        expected = "a list" if arguments[-1] is ... else f"a list of {len(arguments)} values"
    else:
        expected = TYPES.get(hint, "an object")
    raise UserError(f"the setting '{name}' cannot be {value!r:.100}; it must be {expected}.")
