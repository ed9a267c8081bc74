"""Exports the generator of a run as a VQModel of diffusers.

    taming-jax export diffusers --workdir runs/birds --out birds_vqmodel

`VQModel.from_pretrained("birds_vqmodel")` loads it.
"""

from dataclasses import dataclass
from pathlib import Path

from taming_jax.cli.arguments import parse


@dataclass(frozen=True)
class ExportDiffusers:
    workdir: Path
    """The run's folder."""
    out: Path
    """The new folder to write."""


def main() -> None:
    args = parse(ExportDiffusers, __doc__)
    from taming_jax.interop.diffusers import export_run

    step = export_run(args.workdir, args.out)
    print(f"Wrote step {step} of {args.workdir} to {args.out}.")
