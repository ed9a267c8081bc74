"""The entry point of `taming-jax` and `python -m taming_jax.cli`, which runs a subcommand."""

import difflib
import importlib
import sys

from taming_jax.errors import UserError, report, say

# The module and function of each subcommand, and its line of help.
COMMANDS = {
    "train-vqgan": ("train:train_vqgan", "train stage 1, the VQ-GAN"),
    "train-prior": ("train:train_prior", "train stage 2, the prior over the codes of stage 1"),
    "sample": ("sample:main", "draw new images from a run"),
    "complete": ("sample:complete", "complete pictures"),
    "evaluate": ("evaluate:main", "evaluate a run, or compare two reports"),
    "encode": ("encode:main", "encode a split of a run's dataset"),
    "dataset": ("dataset:main", "describe a dataset"),
    "import compvis": ("import_compvis:main", "import an official checkpoint as a run"),
    "import llamagen": ("import_llamagen:main", "import LlamaGen checkpoints as a run"),
    "import diffusers": ("import_diffusers:main", "import a VQModel of diffusers as a run"),
    "export compvis": ("export_compvis:main", "export a run as an official checkpoint"),
    "export diffusers": ("export_diffusers:main", "export a run as a VQModel of diffusers"),
    "push": ("push:main", "upload a run to the Hugging Face hub"),
    "pull": ("pull:main", "download a run from the Hugging Face hub"),
    "playground": ("playground:main", "serve a page on which you can try a run"),
    "verify": ("verify:main", "verify that a run is what its settings and data produce"),
    "compare": ("compare:main", "train quantizers and priors, and compare them in a table"),
    "benchmark": ("benchmark:main", "measure how fast a preset trains on this machine"),
}


def show_help(names: list[str]) -> None:
    # `say` ignores a closed pipe, as in `taming-jax | head -1`.
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
