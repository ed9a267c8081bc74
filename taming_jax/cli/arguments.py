"""Arguments that several commands share: a preset or config.json with settings over it, the dataset
of a run, and where this process stands among several."""

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
    diff_configs,
    list_presets,
    load_config,
    read_config,
    replace_section,
    validate_config,
)
from taming_jax.config.schema import Config, DataConfig
from taming_jax.errors import UserError
from taming_jax.parallel.distributed import Processes
from taming_jax.storage import check_writable

T = TypeVar("T")


def parse(command: type[T], description: str | None) -> T:
    """The command line as the settings of a command, a dataclass whose docstrings are its help.
    tyro ends the process with status 2, and a message of its own, where a flag is wrong."""
    return tyro.cli(command, description=description, args=sys.argv[1:])


# Settings of a dataset that a run's networks fix, or that matter in training only.
FIXED_OR_TRAINING_ONLY = ("image_size", "channels", "random_crop", "mirror")
HELP = {
    "name": "folder, OWNER/NAME of the Hugging Face hub, …; needed to use other data",
    "path": "the folder that the data is in now",
    "cache": "the folder of decoded images",
}
# The others as flags `--data.…`: only needed if the data has moved, or to use other data.
DataFlags: Any = dataclasses.make_dataclass(
    "DataFlags",
    [
        (name, Annotated[kind | None, tyro.conf.arg(help=HELP.get(name, "as in training"))], None)
        for name, kind in typing.get_type_hints(DataConfig).items()
        if name not in FIXED_OR_TRAINING_ONLY
    ],
    frozen=True,
)


def data_settings(given: Any) -> dict[str, Any]:
    """The settings that were given by the flags `--data.…`, by their names in `DataConfig`."""
    return {name: value for name, value in vars(given).items() if value is not None}


def check_output(name: str, file: Path, suffixes: Sequence[str] = ()) -> None:
    """UserError where a file cannot be written, or has none of the suffixes; `name` is the flag
    that names it."""
    if file.is_dir():
        raise UserError(f"{name} {file} is a folder; name a file in it.")
    if suffixes and file.suffix not in suffixes:
        raise UserError(f"{name} {file}: name a {' or a '.join(suffixes)}.")
    check_writable(name, file)


@dataclass(frozen=True)
class Training:
    """What to train, whether to begin anew, and with which other processes."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    restart: bool = False
    """Begin anew in a workdir that holds a run of this stage."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = field(default_factory=Processes)


Command = TypeVar("Command", bound=Training)


def parse_training(
    command: type[Command],
    arguments: Sequence[str],
    stage: str = "vqgan",
    description: str | None = None,
) -> Command:
    """The command line of a training script, or of a command with the same settings.

    `--config` is read first and names the defaults; tyro reads the rest, and exits with status 2
    and its own message where a flag is wrong. Stage "prior" takes the data and stage 1's settings
    from the run in its workdir; flags that contradict them raise UserError.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")
    first.add_argument("--workdir", nargs="?", const="")
    words = [word for word in arguments if word not in ("-h", "--help")]
    known, rest = first.parse_known_args(words)
    wants_help = len(words) < len(arguments)
    base = run = default_config(known.config, known.workdir, wants_help)
    if stage == "prior" and (base.folder / "config.json").exists():
        run = read_config(base.folder / "config.json")
        base = dataclasses.replace(
            base, seed=run.seed, dtype=run.dtype, data=run.data, vqgan=run.vqgan
        )
    elif stage == "prior" and not wants_help:
        into = "" if known.workdir is None else f" --workdir {shlex.quote(known.workdir)}"
        raise UserError(
            f"{base.folder} holds no stage 1 to learn the codes of; train it first, with "
            f"python train_vqgan.py --config {known.config}{into}"
        )
    line = tyro.cli(
        command, default=command(base), args=["--help"] if wants_help else rest,
        description=description,
    )  # fmt: skip
    different = diff_configs(line.config, run, ("data", "vqgan")) if stage == "prior" else []
    if different:
        raise UserError(
            f"the run in {base.folder} was trained otherwise: {'; '.join(different)}. Leave these "
            "settings out, or train a stage 1 with them."
        )
    config = with_absolute_paths(line.config)
    return dataclasses.replace(line, config=validate_config(config))


def default_config(name: str | None, workdir: str | None, wants_help: bool) -> Config:
    """The config that --config and --workdir name, and flags change; mnist's, to show its help,
    where it does not exist."""
    if name is None and not wants_help:
        raise UserError(
            f"say which --config to train; the presets are {', '.join(list_presets())}."
        )
    try:
        config = load_config(name or "mnist")
    except UserError:
        if not wants_help:
            raise
        config = load_config("mnist")
    if workdir == "" and not wants_help:
        raise UserError("--workdir needs a value, the run's folder.")
    return dataclasses.replace(config, workdir=workdir or config.workdir)


def with_absolute_paths(config: Config) -> Config:
    """The config of a run that may be used from another folder later."""
    for section, name in (("data", "path"), ("vqgan", "init_from"), ("prior", "init_from")):
        if (path := getattr(getattr(config, section), name)) is not None:
            config = replace_section(config, section, **{name: str(Path(path).absolute())})
    return config
