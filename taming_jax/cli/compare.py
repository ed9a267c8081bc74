"""Trains quantizers and priors for equally many steps, and compares them in tables and figures.

    taming-jax compare --workdir runs/compare --config mnist_tiny --seeds 2
    taming-jax compare --workdir runs/compare --quantizers vq ema fsq --priors
    taming-jax compare --workdir runs/compare --quantizers "vq --vqgan.vq.restart-after 20"

Each name of a quantizer or prior may be followed by settings. Settings that are not part of a name,
such as --vqgan.codebook-size 4096, apply to all runs. Each prior is trained on each quantizer. Runs
that are already in the workdir are not trained again but stay in the tables, and interrupted runs
are resumed. If a run fails, the others continue. The workdir gets comparison.md, its figures, and
one folder per quantizer, prior and seed.
"""

import contextlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from taming_jax.cli.arguments import Training, parse_known, parse_training
from taming_jax.config.load import load_config
from taming_jax.config.priors import PRIOR_CONFIGS
from taming_jax.config.schema import Config
from taming_jax.errors import RunFailed, UserError, say
from taming_jax.evaluation.protocol import Protocol
from taming_jax.storage import atomic_write, folder_lock, report_unwritable

# Flags that must be the same for all runs, or that belong to this command.
RESERVED = ("--config", "--workdir", "--restart", "--seed", "--vqgan.quantizer", "--vqgan.steps",
            "--vqgan.epochs", "--prior.kind", "--prior.steps", "--prior.epochs",
            "--distributed")  # fmt: skip
TITLE = "Comparison with {}"


@dataclass(frozen=True)
class Compare:
    workdir: Path
    """The folder for the tables and all runs."""
    config: str = "mnist_tiny"
    """The preset, or the path of a config.json."""
    quantizers: tuple[str, ...] = ()
    """Names of quantizers, each optionally followed by settings, as in "vq
    --vqgan.vq.restart-after 20". Default: the quantizer of the preset."""
    priors: tuple[str, ...] = tuple(PRIOR_CONFIGS)
    """Kinds of priors, each optionally followed by settings, as in "masked --prior.layers 2".
    Without a value: no priors. Default: all kinds."""
    seeds: int = 1
    """The number of seeds, from 0, that everything is trained with."""
    steps: int | None = None
    """The number of steps of stage 1. Default: as in the preset."""
    prior_steps: int | None = None
    """The number of steps of each prior. Default: as in the preset."""
    images: int | None = None
    """The number of images of the test split to evaluate each run on. Default: all."""
    samples: int = 5000
    """The number of samples to evaluate each prior on."""


@dataclass(frozen=True)
class Row:
    """A run to train: a quantizer or, with a prior, a prior on this quantizer. Both are as on the
    command line; `prior` is empty without a prior."""

    quantizer: str
    prior: str
    seed: int
    config: Config
    command: str

    @property
    def name(self) -> str:
        prior = f"{self.prior} on " if self.prior else ""
        return f"{prior}{self.quantizer}, seed {self.seed}"

    @property
    def stage(self) -> str:
        return "prior" if self.prior else "vqgan"


def name_folder(quantizer: str, prior: str, seed: int) -> str:
    """Returns the folder of a run within the workdir: "vq --vqgan.channels 8" with seed 1 becomes
    "vq-vqgan.channels-8/seed-1"."""
    name = re.sub(r"[^\w.]+", "-", f"{quantizer} {prior}").strip("-")
    return f"{name}/seed-{seed}"


def load_row(args: Compare, quantizer: str, prior: str, seed: int, settings: Sequence[str]) -> Row:
    """Returns a row. `settings` are the flags of all rows. Raises UserError, which names the row,
    if settings are reserved, invalid or in conflict. For a flag that does not exist, the parser
    prints a message and ends the process with status 2."""
    try:
        (name, *flags), (kind, *prior_flags) = (shlex.split(x) or [""] for x in (quantizer, prior))
        reserved = {flag.split("=")[0] for flag in (*settings, *flags, *prior_flags)} & {*RESERVED}
        if reserved:
            raise UserError(
                f"{min(reserved)} must be the same for all rows. Leave it out, or set it with the "
                "flags of this command."
            )
        if data := [x for x in flags if x.startswith("--data.")]:
            raise UserError(f"{data[0]} must be the same for all rows; set it outside of the row.")
        if other := [x for x in prior_flags if x.startswith("--") and x[:8] != "--prior."]:
            raise UserError(f"{other[0]} is not a setting of the prior; add it to a quantizer.")
        folder = args.workdir / name_folder(quantizer, prior, seed)
        common = [f"--config={args.config}", f"--seed={seed}", *settings]
        first = [f"--vqgan.quantizer={name}", *flags]
        second = [f"--prior.kind={kind}", *prior_flags] if prior else []
        if args.steps is not None:
            first.append(f"--vqgan.steps={args.steps}")
        if args.prior_steps is not None and prior:
            second.append(f"--prior.steps={args.prior_steps}")
        words = [*common, *first, *second]
        config = parse_training(Training, [*words, "--workdir", str(folder)]).config
        script = "train_prior.py" if prior else "train_vqgan.py"
        command = shlex.join(["python", script, *words])
        return Row(quantizer, prior, seed, config, command)
    except (UserError, ValueError) as error:  # shlex raises ValueError for an open quotation mark
        row = f"{prior} on {quantizer}" if prior else quantizer
        raise UserError(f"in the row '{row}': {error}") from error


def check_protocol(args: Compare, settings: Sequence[str]) -> None:
    """Writes what all rows of a workdir share into it. Raises UserError if earlier rows differ."""
    file = args.workdir / "protocol.json"
    names = ("config", "steps", "prior_steps", "images", "samples")
    protocol = {name: getattr(args, name) for name in names} | {"settings": " ".join(settings)}
    earlier = json.loads(file.read_text()) if file.exists() else protocol
    for name, value in protocol.items():
        if earlier.get(name) != value:
            raise UserError(
                f"the rows in {args.workdir} were made with {name} {earlier.get(name)}, not "
                f"{value}. Use the same value, or another --workdir."
            )
    atomic_write(file, json.dumps(protocol).encode())


def copy_stage_1(source: Path, target: Path) -> None:
    """Copies the trained stage 1 of a run into another folder, where a prior is trained on it."""
    if (target / "config.json").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    copied = target / "checkpoints" / "vqgan"
    shutil.rmtree(copied, ignore_errors=True)  # from an interrupted copy
    shutil.copytree(source / "checkpoints" / "vqgan", copied)
    shutil.copy2(source / "config.json", target / "config.json")


def measure(row: Row, args: Compare) -> None:
    """Trains and evaluates a row, and writes its results into its folder."""
    from taming_jax.evaluation.comparison import RESULT, measure_run
    from taming_jax.parallel.devices import Devices
    from taming_jax.run import load_run
    from taming_jax.training import train

    config, folder = row.config, row.config.folder
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
        if row.prior:
            base = args.workdir / name_folder(row.quantizer, "", row.seed)
            if not (base / RESULT).exists():
                raise RunFailed("there is no stage 1 to train it on.")
            copy_stage_1(base, folder)
        train(config, row.stage)
        if row.prior:  # the prior's checkpoints refer to a copy of the generator
            shutil.rmtree(folder / "checkpoints" / "vqgan", ignore_errors=True)
        result = measure_run(load_run(folder), row.stage, args.images, args.samples)
    devices = Devices(config.devices).describe()
    versions = devices["versions"]
    result |= {
        "quantizer": row.quantizer, "prior": row.prior, "seed": row.seed,
        "folder": str(folder.relative_to(args.workdir)), "command": row.command,
        "machine": f"{devices['devices']} x {devices['device_kind']}, {devices['cores']} cores, "
        f"jax {versions['jax']}",
    }  # fmt: skip
    atomic_write(folder / RESULT, json.dumps(result).encode())


def main() -> None:
    args, settings = parse_known(Compare, __doc__)
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}; it must be 1 or more.")
    if args.priors and not args.samples:
        raise UserError("--samples is 0, but priors are evaluated on samples; use at least 2.")
    Protocol(images=args.images, samples=args.samples)  # raises UserError for invalid numbers
    quantizers = args.quantizers or (load_config(args.config).vqgan.quantizer,)
    rows = [
        load_row(args, quantizer, prior, seed, settings)
        for seed in range(args.seeds)
        for quantizer in quantizers
        for prior in ("", *args.priors)
    ]
    with folder_lock(args.workdir, "comparing"):
        with report_unwritable(args.workdir):
            check_protocol(args, settings)
        failed = [row.name for row in rows if not try_row(row, args)]
        if len(failed) < len(rows):
            from taming_jax.evaluation import comparison

            with report_unwritable(args.workdir):
                comparison.measure_speeds(args.workdir)
                comparison.draw_figures(args.workdir)
                print(comparison.write_page(args.workdir, TITLE.format(args.config)), end="")
    if failed:
        raise RunFailed(f"these rows failed: {'; '.join(failed)}. The others are in the tables.")


def try_row(row: Row, args: Compare) -> bool:
    """Trains and evaluates a row unless it is finished, and updates the tables. If it fails, prints
    why and returns false."""
    from jax.errors import JaxRuntimeError

    from taming_jax.evaluation.comparison import RESULT, write_page

    if (row.config.folder / RESULT).exists():
        return True
    try:
        measure(row, args)
        write_page(args.workdir, TITLE.format(args.config))
    except (UserError, RunFailed, OSError, JaxRuntimeError) as error:  # such as too little memory
        say(f"The row '{row.name}' failed: {error}", sys.stderr)
        return False
    return True
