"""Loads, overrides, compares and writes configs, which are presets or a run's `config.json`.

The command line is in cli/.
"""

import contextlib
import dataclasses
import difflib
import importlib
import json
import os
import pkgutil
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taming_jax.config.fields import KindSettings
from taming_jax.config.migrations import FORMAT, SETTINGS_MIGRATIONS, migrate, read_format
from taming_jax.config.schema import UNKNOWN, Config
from taming_jax.config.serialization import from_dict, to_dict
from taming_jax.config.validation import (
    format_flag,
    refuse_settings_without_effect,
    validate_config,
)
from taming_jax.errors import UserError
from taming_jax.storage import atomic_write, expand_user

PATHS = {"data": ("path", "cache"), "vqgan": ("init_from",), "prior": ("init_from",)}


def list_presets() -> list[str]:
    """Returns the names of the presets."""
    from taming_jax.config import presets

    return sorted(module.name for module in pkgutil.iter_modules(presets.__path__))


def load_config(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Loads a preset by its name, or a run's settings by the path of its config.json.

    `overrides` replaces settings by their dotted names: `{"vqgan.steps": 100}`. Raises UserError if
    the name or a setting does not exist, or if settings are invalid or conflict.
    """
    name = str(expand_user(name))
    if name in list_presets():
        config = importlib.import_module(f"taming_jax.config.presets.{name}").CONFIG
    elif name.endswith(".json") or os.sep in name:
        config = read_config(Path(name))
        # This step belongs to the run that wrote the file, which keeps it when it is resumed. A new
        # run with these settings computes its own.
        config = replace_section(config, "vqgan", discriminator_start_step=None)
    else:
        matches = difflib.get_close_matches(name, list_presets(), n=1)
        hint = f" (did you mean '{matches[0]}'?)" if matches else ""
        raise UserError(
            f"there is no preset '{name}'{hint}; use one of {', '.join(list_presets())}, or the "
            "path of a config.json."
        )
    return override(config, overrides or {})


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Returns a config in which `overrides` replaces settings by name, such as "vqgan.steps".

    Raises UserError if a setting does not exist, or if settings are invalid or conflict.
    """
    values = to_dict(config)
    for name, value in overrides.items():
        *sections, last = name.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part)
            if not isinstance(section, dict):
                raise UserError(f"there is no setting '{name}'; check its name.")
        if isinstance(section.get(last), dict):
            raise UserError(f"'{name}' is a group of settings; name one of them: '{name}.…'.")
        section[last] = value
    changed = validate_config(expand_paths(from_dict(Config, values)))
    refuse_settings_without_effect(changed, config)
    return changed


def expand_paths(config: Config) -> Config:
    """Returns a config in whose paths a leading ~ is replaced with the home folder. Shells do not
    expand it everywhere, for example in --flag=~/x."""
    workdir = config.workdir and str(expand_user(config.workdir))
    return dataclasses.replace(convert_paths(config, expand_user), workdir=workdir)


def convert_paths(config: Config, convert: Callable[[str], Path]) -> Config:
    """Returns a config whose paths, except the workdir, are converted by a function."""
    for section, names in PATHS.items():
        paths = {name: getattr(getattr(config, section), name) for name in names}
        converted = {name: path and str(convert(path)) for name, path in paths.items()}
        config = replace_section(config, section, **converted)
    return config


def replace_section(config: Config, section: str, /, **values: Any) -> Config:
    """Returns a config with some values of one section replaced."""
    changed = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def is_fixed(field: dataclasses.Field) -> bool:
    """Returns whether a setting determines what is trained and so may not change on resuming."""
    return not field.metadata.get("free")


def diff_configs(
    left: Config,
    right: Config,
    sections: Sequence[str],
    is_compared: Callable[[dataclasses.Field], bool] = is_fixed,
) -> list[str]:
    """Returns how two configs differ, one phrase per setting: "--seed is 1, not 2".

    Compares the settings of `sections` for which `is_compared` returns true.
    """

    # An imported run knows only the size and channels of its images.
    unknown = UNKNOWN in (left.data.name, right.data.name)
    left, right = (drop_unmatched_attention(config) for config in (left, right))

    def walk(a: Any, b: Any, names: tuple[str, ...]) -> list[str]:
        phrases: list[str] = []
        for f in dataclasses.fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            if not names and f.name not in sections:
                continue
            if unknown and names == ("data",) and f.name not in ("image_size", "channels"):
                continue
            if isinstance(x, KindSettings) and f.name != a.selected:
                continue  # the settings of another kind have no effect
            if dataclasses.is_dataclass(x):
                phrases += walk(x, y, (*names, f.name))
            elif x != y and is_compared(f):
                name = format_flag(*names, f.name)
                phrases.append(f"{name} is {format_value(x)}, not {format_value(y)}")
        return phrases

    return walk(left, right, ())


def advise_on_settings(run: Path) -> str:
    """Returns a sentence that tells you how to resume a run with its own settings."""
    folder = shlex.quote(str(run))
    return (
        "Pass the settings that the run was created with, or load all of them with "
        f"--config {shlex.quote(str(run / 'config.json'))} --workdir {folder}."
    )


def drop_unmatched_attention(config: Config) -> Config:
    """Returns a config without the attention resolutions that have no effect, as no level has
    them."""
    kept = (x for x in config.vqgan.attention_resolutions if x in config.level_resolutions)
    return replace_section(config, "vqgan", attention_resolutions=tuple(kept))


def format_value(value: Any) -> str:
    return (" ".join(map(str, value)) or "empty") if isinstance(value, tuple) else str(value)


def read_config(path: Path) -> Config:
    """Reads a config.json. Raises UserError if it is missing or not a config."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a config.json.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); name a run's config.json.") from error
    number = read_format(values, path) if isinstance(values, dict) else FORMAT
    try:
        return parse_settings(values, number)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def update_data_settings(config: Config, folder: Path) -> Config:
    """Returns a checkpoint's config with the data settings of the run's config.json, where the user
    may have changed the path, or named the dataset of an imported run. Keeps those of the
    checkpoint if config.json describes other data."""
    with contextlib.suppress(UserError):
        current = read_config(folder / "config.json")
        if not diff_configs(current, config, ("data",)):
            return dataclasses.replace(config, data=current.data)
    return config


def remove_machine_settings(config: Config) -> Config:
    """Returns a config for others to see and use: without paths, and with the defaults of what
    depends on the machine or its user."""
    for section, names in PATHS.items():
        config = replace_section(config, section, **dict.fromkeys(names))
    default = Config()
    names = ("workdir", "devices", "deterministic", "log", "compile_cache")
    config = dataclasses.replace(config, **{name: getattr(default, name) for name in names})
    return replace_section(config, "data", workers=default.data.workers)


def parse_settings(values: Any, number: int) -> Config:
    """Converts the settings of a config in format `number` (config/migrations.py) to a config.

    Raises UserError if a setting is unknown or its value has the wrong type.
    """
    if isinstance(values, dict):
        values = migrate(
            {k: v for k, v in values.items() if k != "format"}, number, SETTINGS_MIGRATIONS
        )
    return from_dict(Config, values)


def write_config(config: Config, path: Path) -> None:
    """Writes a config.json atomically. Raises OSError if it cannot be written."""
    content = {"format": FORMAT} | dataclasses.asdict(config)
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())
