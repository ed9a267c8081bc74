"""Verifies that a run, or each run of a comparison, is what its settings and data produce.

    taming-jax verify runs/mnist_tiny
    taming-jax verify runs/compare/comparison.md

Compares the hashes of all checkpoints and of the data, and repeats the steps between the last two
checkpoints (from the start if there is only one). On a machine like that of the run, they must give
the last checkpoint, bit for bit. Elsewhere, and on a GPU without --deterministic, the metrics of
the steps up to the next line of the log must agree with it, up to rounding. The exit status is 0, 1
if something differs, or 2 if the arguments are wrong.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from taming_jax.cli.arguments import parse
from taming_jax.errors import RunFailed, UserError, say


@dataclass(frozen=True)
class Verify:
    run: tyro.conf.Positional[Path]
    """The folder of a run, or the comparison.md of `taming-jax compare`."""


def main() -> None:
    path = parse(Verify, __doc__).run
    if not path.exists():
        raise UserError(f"there is no {path}; name the folder of a run, or a comparison.md.")
    if path.is_dir():
        from taming_jax.training.replay import verify_run

        verify_run(path)
    else:
        verify_table(path)


def verify_table(file: Path) -> None:
    """Verifies the runs of a table. Raises RunFailed with the names of those that fail."""
    from taming_jax.evaluation.comparison import read_runs
    from taming_jax.run import hash_run
    from taming_jax.training.replay import verify_run

    failed = []
    for folder, expected in read_runs(file):
        say(f"{folder}")
        try:
            if (actual := hash_run(folder)) != expected:
                raise RunFailed(f"its weights have the hash {actual}, not {expected}.")
            verify_run(folder)
        except (UserError, RunFailed) as error:
            say(f"failed: {error}")
            failed.append(str(folder))
    if failed:
        raise RunFailed(f"these runs could not be verified: {', '.join(failed)}.")
