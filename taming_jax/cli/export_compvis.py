"""Exports a run's best weights as a checkpoint of the official code (CompVis/taming-transformers),
with its YAML next to it.

    taming-jax export compvis --workdir runs/birds --out birds.safetensors

`--out` ends in .safetensors, or in .ckpt if PyTorch is installed; the YAML has the same stem.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from taming_jax.cli.arguments import check_output, parse
from taming_jax.errors import UserError


@dataclass(frozen=True)
class Export:
    workdir: Path
    """The run's folder."""
    out: Path
    """The FILE.safetensors or FILE.ckpt to write."""
    stage: Literal["vqgan", "prior"] | None = None
    """The stage to export. Default: prior if the run has one, else vqgan."""


def main() -> None:
    args = parse(Export, __doc__)
    from taming_jax.interop.compvis_export import export_run
    from taming_jax.weights.state_dict import check_suffix

    check_suffix(args.out)
    check_output("--out", args.out)
    if not args.workdir.is_dir():
        raise UserError(f"there is no folder {args.workdir}; name the folder of a run.")
    step = export_run(args.workdir, args.out, args.stage)
    print(f"Wrote step {step} of {args.workdir} to {args.out} and {args.out.with_suffix('.yaml')}.")
