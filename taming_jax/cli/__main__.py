"""The command `taming-jax`, and `python -m taming_jax.cli`: a subcommand by its name."""

import difflib
import importlib
import sys

from taming_jax.errors import UserError, report, say

# Where each subcommand is, and what it does.
COMMANDS = {
    "train-vqgan": ("train:train_vqgan", "train stage 1, the VQ-GAN"),
    "train-prior": ("train:train_prior", "train stage 2, the prior over its codes"),
    "sample": ("sample:main", "draw images from a run"),
    "complete": ("sample:complete", "draw the rest of given pictures"),
    "evaluate": ("evaluate:main", "measure a run, or compare two reports"),
    "encode": ("encode:main", "write a split of a run's dataset as codes"),
    "dataset": ("dataset:main", "show what a dataset holds"),
    "import compvis": ("import_compvis:main", "make a run of an official checkpoint"),
    "import llamagen": ("import_llamagen:main", "make a run of LlamaGen's checkpoints"),
    "export compvis": ("export_compvis:main", "write a run as an official checkpoint"),
    "recipes": ("recipes:main", "train and measure the rows of docs/recipes.md"),
    "benchmark": ("benchmark:main", "measure how fast a preset trains on this machine"),
}


def show_help(names: list[str]) -> None:
    # By `say`, since the reader of a pipe may have gone.
    say("usage: taming-jax COMMAND [settings]; `taming-jax COMMAND --help` shows its settings.\n")
    for name in names:
        say(f"  {name:<16} {COMMANDS[name][1]}")


def call(name: str) -> None:
    module, function = COMMANDS[name][0].split(":")
    getattr(importlib.import_module(f"taming_jax.cli.{module}"), function)()


def dispatch() -> None:
    arguments = sys.argv[1:]
    for length in (2, 1):  # `import compvis` is one command
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            sys.argv = [f"taming-jax {name}", *arguments[length:]]
            call(name)
            return
    words = [word for word in arguments if word not in ("-h", "--help")]
    if names := [name for name in COMMANDS if name.split()[: len(words)] == words]:
        show_help(names)
        return
    close = difflib.get_close_matches(words[0], COMMANDS, 1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UserError(f"there is no command '{words[0]}'; {hint}`taming-jax` lists the commands.")


def run(name: str) -> int:
    """Runs a subcommand with the arguments of this process, and returns its exit status."""
    return report(lambda: call(name))


def main() -> int:
    return report(dispatch)


if __name__ == "__main__":
    sys.exit(main())
