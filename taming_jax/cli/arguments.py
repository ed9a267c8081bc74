"""Arguments that several commands share: a preset or config.json with settings over it, the dataset
of a run, and where this process stands among several."""

import argparse
import dataclasses
import os
import shlex
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from taming_jax.config.load import (
    differences,
    load_config,
    preset_names,
    read_config,
    replaced,
    validated,
)
from taming_jax.config.schema import Config, DataConfig
from taming_jax.config.validation import flag
from taming_jax.errors import UserError
from taming_jax.parallel.distributed import Processes, checked


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The same settings as flags of a script that has few others."""
    parser.add_argument("--distributed", action="store_true", help="with other processes")
    for name, kind in (
        ("coordinator-address", str), ("num-processes", int), ("process-id", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--initialization-timeout", type=int, default=300)


# Settings of a dataset that a run's networks fix, or that matter in training only.
FIXED_OR_TRAINING_ONLY = ("image_size", "channels", "random_crop", "mirror")
HELP = {
    "name": "folder, OWNER/NAME of the Hugging Face hub, …; needed to use other data",
    "path": "the folder that the data is in now",
    "cache": "the folder of decoded images",
}


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags `--data.…` of a script that reads the dataset of a run."""
    group = parser.add_argument_group(
        "data", "only needed if the data has moved, or to measure on other data"
    )
    hints = typing.get_type_hints(DataConfig)
    for name in (name for name in hints if name not in FIXED_OR_TRAINING_ONLY):
        kinds = typing.get_args(hints[name]) or (hints[name],)
        options: dict[str, Any] = {"dest": f"data.{name}", "default": None}
        options["help"] = HELP.get(name, "as in training")
        if bool in kinds:
            group.add_argument(flag("data", name), action="store_true", **options)
            group.add_argument(flag("data", f"no_{name}"), action="store_false", **options)
        else:
            group.add_argument(flag("data", name), type=kinds[0], metavar=name.upper(), **options)


def data_settings(given: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given by the flags `--data.…`, by their names in `DataConfig`."""
    return {
        name.removeprefix("data."): value
        for name, value in vars(given).items()
        if name.startswith("data.") and value is not None
    }


def processes(given: Any) -> Processes:
    """What is said of processes in an object that has such attributes, checked; where it is only
    the address, the numbers are Open MPI's (of which JAX knows version 4's address alone)."""
    names = [field.name for field in dataclasses.fields(Processes)]
    told = Processes(**{name: getattr(given, name) for name in names})
    size, rank = (os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    alone = told.coordinator_address and told.num_processes is None and told.process_id is None
    if alone and size is not None and rank is not None:
        told = dataclasses.replace(told, num_processes=int(size), process_id=int(rank))
    return checked(told)


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
    import tyro

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
