"""Verifies that a run, or each run of a comparison, is what its settings and data produce.

    taming-jax verify runs/mnist_tiny
    taming-jax verify runs/compare/comparison.md

Compares the hashes of all checkpoints and of the data, and repeats the steps between the last two
checkpoints (from the start if there is only one). On a machine like that of the run, they must give
the last checkpoint, bit for bit. Elsewhere, and on a GPU without --deterministic, only the first of
these steps is repeated, and its metrics must agree up to rounding. The exit status is 0, 1 if
something differs, or 2 if the arguments are wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from taming_jax.cli.arguments import DataFlags, collect_data_settings, parse
from taming_jax.errors import RunFailed, UserError, say


@dataclass(frozen=True)
class Verify:
    run: tyro.conf.Positional[Path]
    """The folder of a run, or the comparison.md of `taming-jax compare`."""
    data: DataFlags = field(default_factory=DataFlags)


def main() -> None:
    args = parse(Verify, __doc__)
    path, data = args.run, collect_data_settings(args.data)
    if not path.exists():
        raise UserError(f"there is no {path}; name the folder of a run, or a comparison.md.")
    if path.is_dir():
        from taming_jax.training.replay import verify_run

        verify_run(path, data)
    else:
        verify_table(path, data)


def verify_table(file: Path, data: Mapping[str, Any]) -> None:
    """Verifies the tables, and the runs in them. Raises RunFailed with the names of those that
    fail."""
    from taming_jax.evaluation.comparison import check_page, read_runs
    from taming_jax.parallel.runtime import prepare
    from taming_jax.run import hash_run
    from taming_jax.training.replay import read_current_config, verify_run

    runs = read_runs(file)
    check_page(file)
    configs = [read_current_config(folder) for folder, _ in runs]
    prepare(max(configs, key=lambda config: config.deterministic))  # JAX has not started yet
    failed = []
    for folder, expected in runs:
        say(f"{folder}")
        try:
            if (actual := hash_run(folder)) != expected:
                raise RunFailed(f"its weights have the hash {actual}, not {expected}.")
            verify_run(folder, data)
        except (UserError, RunFailed) as error:
            say(f"failed: {error}")
            failed.append(str(folder))
    if failed:
        raise RunFailed(f"these runs could not be verified: {', '.join(failed)}.")
