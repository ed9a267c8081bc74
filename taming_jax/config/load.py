"""Loads configs: presets by name, a run's `config.json`, and overrides; compares and writes them.
The command line is in cli/.
"""

import dataclasses
import difflib
import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taming_jax.config.migrations import FORMAT, SETTINGS, format_of, migrated
from taming_jax.config.schema import UNKNOWN, Config
from taming_jax.config.serialization import from_dict, to_dict
from taming_jax.config.validation import flag, validated
from taming_jax.errors import UserError
from taming_jax.files import write_whole


def preset_names() -> list[str]:
    """The names of the presets."""
    from taming_jax.config import presets

    return sorted(module.name for module in pkgutil.iter_modules(presets.__path__))


def load_config(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """A preset by its name, or a run's settings by the path of its config.json.

    `overrides` replaces settings by their dotted names: `{"vqgan.steps": 100}`.
    Raises UserError for a name or a setting that does not exist, and for settings that cannot work
    together.
    """
    name = str(name)
    if name in preset_names():
        config = importlib.import_module(f"taming_jax.config.presets.{name}").CONFIG
    elif name.endswith(".json") or os.sep in name:
        config = read_config(Path(name))
        # It belongs to the run that the file was written for, which takes it from its checkpoints.
        # A new run with these settings computes its own.
        config = replaced(config, "vqgan", discriminator_start_step=None)
    else:
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(
            f"there is no preset '{name}'; {hint}the presets are {', '.join(preset_names())}; "
            "the path of a config.json is accepted as well."
        )
    return override(config, overrides or {})


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A config with other values of the settings that `overrides` names, such as "vqgan.steps".

    Raises UserError for a setting that does not exist, and for settings that cannot work together.
    """
    values = to_dict(config)
    for dotted, value in overrides.items():
        *sections, last = dotted.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part)
            if not isinstance(section, dict):
                raise UserError(f"there is no setting '{dotted}'.")
        if isinstance(section.get(last), dict):
            raise UserError(f"'{dotted}' is a group; name its settings, '{dotted}.…'.")
        section[last] = value
    return validated(from_dict(Config, values))


def replaced(config: Config, section: str, **values: Any) -> Config:
    """A config with other values in one of its sections."""
    changed = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def is_fixed(field: dataclasses.Field) -> bool:
    """Whether a setting defines what is trained, so that a resumed run may not change it."""
    return not field.metadata.get("free")


def differences(
    left: Config,
    right: Config,
    sections: Sequence[str],
    compared: Callable[[dataclasses.Field], bool] = is_fixed,
) -> list[str]:
    """Returns how two configs differ in the settings that `compared` selects, one phrase per
    setting: "--seed is 1, not 2"."""

    unknown = UNKNOWN in (left.data.name, right.data.name)
    left, right = (with_matching_attention(config) for config in (left, right))

    def walk(a: Any, b: Any, names: tuple[str, ...]) -> list[str]:
        found = []
        for f in dataclasses.fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            if not names and f.name not in sections:
                continue
            if unknown and names == ("data",) and f.name not in ("image_size", "channels"):
                continue
            if dataclasses.is_dataclass(x):
                found += walk(x, y, (*names, f.name))
            elif x != y and compared(f):
                found.append(f"{flag(*names, f.name)} is {show(x)}, not {show(y)}")
        return found

    return walk(left, right, ())


def with_matching_attention(config: Config) -> Config:
    """The config without resolutions of attention that no level has, which have no effect."""
    kept = (x for x in config.vqgan.attention_resolutions if x in config.level_resolutions)
    return replaced(config, "vqgan", attention_resolutions=tuple(kept))


def show(value: Any) -> str:
    return (" ".join(map(str, value)) or "empty") if isinstance(value, tuple) else str(value)


def read_config(path: Path) -> Config:
    """A config.json. Raises UserError where it is missing or no config."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a config.json.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); name a run's config.json.") from error
    number = format_of(values, path) if isinstance(values, dict) else FORMAT
    try:
        return settings(values, number)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def settings(values: Any, number: int) -> Config:
    """The config that was written in a format (config/migrations.py) up to today's. UserError for
    unknown settings and values of a wrong type."""
    if isinstance(values, dict):
        values = migrated({k: v for k, v in values.items() if k != "format"}, number, SETTINGS)
    return from_dict(Config, values)


def write_config(config: Config, path: Path) -> None:
    """Writes a config.json, whole or not at all. Raises OSError."""
    content = {"format": FORMAT} | dataclasses.asdict(config)
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
