"""Arguments that several commands share: a preset or config.json with settings over it, the dataset
of a run, and where this process stands among several."""

import argparse
import dataclasses
import os
import shlex
import sys
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro

from taming_jax.config.load import (
    differences,
    load_config,
    preset_names,
    read_config,
    replaced,
    validated,
)
from taming_jax.config.schema import Config, DataConfig
from taming_jax.errors import UserError
from taming_jax.files import check_writable
from taming_jax.parallel.distributed import Processes, checked

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


def processes(given: Processes) -> Processes:
    """How this process is one of several, from the settings of a command, checked. Where only the
    address is given, the numbers are Open MPI's (of which JAX knows version 4's address alone)."""
    names = [field.name for field in dataclasses.fields(Processes)]
    given = Processes(**{name: getattr(given, name) for name in names})
    size, rank = (os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    alone = given.coordinator_address and given.num_processes is None and given.process_id is None
    if alone and size is not None and rank is not None:
        given = dataclasses.replace(given, num_processes=int(size), process_id=int(rank))
    return checked(given)


def join_processes(given: Processes, own: Collection[str]) -> None:
    """Joins the other processes of a command, if there are any, silences all but the first, and
    checks that they were given the same settings, but for their `own`."""
    from taming_jax.parallel import distributed

    distributed.join(processes(given))
    distributed.one_speaks()
    flags = dataclasses.asdict(given)
    flags |= {f"data.{name}": value for name, value in flags.pop("data", {}).items()}
    distributed.check_same_flags({k: x for k, x in flags.items() if k not in own})


@dataclass(frozen=True)
class CommandLine(Processes, Config):
    restart: bool = False
    """Begin anew in a workdir that holds a run of this stage."""


class Command(NamedTuple):
    """What to train, whether to begin anew, and with which other processes."""

    config: Config
    restart: bool
    processes: Processes


def parse_arguments(arguments: Sequence[str], stage: str = "vqgan") -> Command:
    """The command line of both training scripts.

    `--config` is read first and names the defaults; tyro reads the rest, and exits with status 2
    and its own message where a flag is wrong. Stage "prior" takes the data and stage 1's settings
    from the run in its workdir; flags that contradict them raise UserError.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    first.add_argument("--workdir")
    wants_help = bool({"-h", "--help"} & set(arguments))
    known, rest = argparse.Namespace(config=None, workdir=None), list[str]()
    try:
        others = [word for word in arguments if word not in ("-h", "--help")]
        known, rest = first.parse_known_args(others)
    except argparse.ArgumentError as error:
        if not wants_help:
            raise UserError(f"{error}; --config NAME and --workdir DIR need a value.") from error
    if wants_help:
        rest.append("--help")
    elif known.config is None:
        raise UserError(
            f"say which --config to train; the presets are {', '.join(preset_names())}."
        )
    try:
        base = load_config(known.config or "mnist")
    except UserError:
        if not wants_help:
            raise
        base = load_config("mnist")
    if known.workdir is not None:
        base = dataclasses.replace(base, workdir=known.workdir)
    run, has_run = base, (base.folder / "config.json").exists()
    if stage == "prior" and (has_run or not wants_help):
        if not has_run:
            into = "" if known.workdir is None else f" --workdir {shlex.quote(str(known.workdir))}"
            raise UserError(
                f"{base.folder} holds no stage 1 to learn the codes of; train it first, with "
                f"python train_vqgan.py --config {known.config}{into}"
            )
        run = read_config(base.folder / "config.json")
        base = dataclasses.replace(
            base, seed=run.seed, dtype=run.dtype, data=run.data, vqgan=run.vqgan
        )
    shallow = {f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}
    line = tyro.cli(CommandLine, default=CommandLine(**shallow), args=rest)
    config = Config(**{name: getattr(line, name) for name in shallow})
    different = differences(config, run, ("data", "vqgan")) if stage == "prior" else []
    if different:
        raise UserError(
            f"the run in {base.folder} was trained otherwise: {'; '.join(different)}. Leave these "
            "settings out, or train a stage 1 with them."
        )
    # The run may be used from another folder.
    if config.data.path is not None:
        config = replaced(config, "data", path=str(Path(config.data.path).absolute()))
    for name in ("vqgan", "prior"):
        if (source := getattr(config, name).init_from) is not None:
            config = replaced(config, name, init_from=str(Path(source).absolute()))
    return Command(validated(config), line.restart, processes(line))
