"""Command-line arguments that several commands share: a preset or config.json with overrides, the
dataset of a run, and the processes of distributed training."""

import argparse
import dataclasses
import shlex
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from taming_jax.config.load import (
    convert_paths,
    diff_configs,
    expand_paths,
    list_presets,
    load_config,
    read_config,
)
from taming_jax.config.schema import Config, DataConfig
from taming_jax.config.validation import (
    refuse_settings_without_effect,
    validate_config,
)
from taming_jax.errors import UserError
from taming_jax.parallel.distributed import Processes
from taming_jax.storage import check_writable, expand_user

T = TypeVar("T")


def parse(command: type[T], description: str | None) -> T:
    """Parses the command line into the dataclass `command`, whose docstrings are the help texts.
    tyro exits with status 2 and its own message if a flag is invalid."""
    args: Any = tyro.cli(command, description=description, args=sys.argv[1:])
    return expand_user_paths(args)


def parse_known(command: type[T], description: str | None) -> tuple[T, list[str]]:
    """Does the same as `parse`, but also returns the arguments that the command does not know."""
    known: Any = tyro.cli(
        command, description=description, args=sys.argv[1:], return_unknown_args=True
    )
    return expand_user_paths(known[0]), known[1]


def expand_user_paths(args: T) -> T:
    """Returns arguments with ~ replaced in paths."""
    paths = {
        name: tuple(map(expand_user, x)) if isinstance(x, tuple) else expand_user(x)
        for name, x in vars(args).items()
        if isinstance(x, Path) or (isinstance(x, tuple) and x and isinstance(x[0], Path))
    }
    return dataclasses.replace(typing.cast(Any, args), **paths)


# Data settings that the run's networks fix, or that affect only training.
FIXED_OR_TRAINING_ONLY = ("image_size", "channels", "random_crop", "mirror")
HELP = {
    "name": "The dataset. Set it to use different data than in training. Default: as in training.",
    "path": "The folder of the data, if it has moved. Default: as in training.",
    "cache": "The folder for decoded images. Default: as in training.",
}
# All other data settings, as `--data.…` flags, for data that has moved or for other data.
DataFlags: Any = dataclasses.make_dataclass(
    "DataFlags",
    [
        (
            name,
            Annotated[kind | None, tyro.conf.arg(help=HELP.get(name, "Default: as in training."))],
            None,
        )
        for name, kind in typing.get_type_hints(DataConfig).items()
        if name not in FIXED_OR_TRAINING_ONLY
    ],
    frozen=True,
)


def collect_data_settings(flags: Any) -> dict[str, Any]:
    """Returns the settings that were set by `--data.…` flags, by their names in `DataConfig`."""
    return {name: value for name, value in vars(flags).items() if value is not None}


def check_output(name: str, file: Path, suffixes: Sequence[str] = ()) -> None:
    """Raises UserError if the file cannot be written or has none of the suffixes. `name` is the
    flag of the file."""
    if file.is_dir():
        raise UserError(f"{name} {file} is a folder; name a file in it.")
    if suffixes and file.suffix not in suffixes:
        raise UserError(
            f"{name} {file} has the wrong suffix; name a {' or a '.join(suffixes)} file."
        )
    check_writable(name, file)


@dataclass(frozen=True)
class Training:
    """The arguments of a training command."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    restart: bool = False
    """Start over in a workdir that already holds a run of this stage."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = field(default_factory=Processes)


Command = TypeVar("Command", bound=Training)


def parse_training(
    command: type[Command],
    arguments: Sequence[str],
    stage: str = "vqgan",
    description: str | None = None,
) -> Command:
    """Parses the command line of a training script, or of a command with the same settings.

    `--config` and `--workdir` are parsed first because they determine the defaults. tyro parses the
    rest, and exits with status 2 and its own message if a flag is invalid. Stage "prior" takes the
    data and the settings of stage 1 from the run in its workdir. Raises UserError if flags
    contradict them."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")
    first.add_argument("--workdir", nargs="?", const="")
    words = [word for word in arguments if word not in ("-h", "--help")]
    known, rest = first.parse_known_args(words)
    wants_help = len(words) < len(arguments)
    base = run = load_default_config(known.config, known.workdir, wants_help)
    if stage == "prior" and (base.folder / "config.json").exists():
        run = read_config(base.folder / "config.json")
        base = dataclasses.replace(
            base, seed=run.seed, dtype=run.dtype, data=run.data, vqgan=run.vqgan
        )
    elif stage == "prior" and not wants_help:
        workdir = "" if known.workdir is None else f" --workdir {shlex.quote(known.workdir)}"
        raise UserError(
            f"{base.folder} holds no stage 1, which stage 2 requires; set --workdir to the folder "
            f"of a run, or train one with `python train_vqgan.py --config {known.config}{workdir}`."
        )
    parsed = tyro.cli(
        command, default=command(base), args=["--help"] if wants_help else rest,
        description=description,
    )  # fmt: skip
    differences = diff_configs(parsed.config, run, ("data", "vqgan")) if stage == "prior" else []
    if differences:
        raise UserError(
            f"your settings differ from those of the run in {base.folder}: "
            f"{'; '.join(differences)}. "
            "Leave these settings out, or train a new stage 1 with them."
        )
    # Absolute paths, so that the run can be used from any working directory.
    config = convert_paths(parsed.config, lambda path: expand_user(path).absolute())
    refuse_settings_without_effect(validate_config(config), base)
    return dataclasses.replace(parsed, config=config)


def load_default_config(name: str | None, workdir: str | None, wants_help: bool) -> Config:
    """Loads the config named by --config, whose values are the defaults of the flags. For --help,
    falls back to the preset mnist if that config does not exist."""
    if name is None and not wants_help:
        raise UserError(
            f"set --config to a preset ({', '.join(list_presets())}) or the path of a config.json."
        )
    try:
        config = load_config(name or "mnist")
    except UserError:
        if not wants_help:
            raise
        config = load_config("mnist")
    if workdir == "" and not wants_help:
        raise UserError("--workdir needs a value: the folder of the run.")
    return expand_paths(dataclasses.replace(config, workdir=workdir or config.workdir))
