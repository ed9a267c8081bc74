"""Writes a run's best weights as a checkpoint of the official code (CompVis/taming-transformers),
with its YAML beside it.

    taming-jax export compvis --workdir runs/birds --out birds.safetensors

`--out` ends in .safetensors, or in .ckpt where PyTorch is installed; the YAML has the same name.
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
    """FILE.safetensors or FILE.ckpt."""
    stage: Literal["vqgan", "prior"] | None = None
    """Default: the prior, where there is one."""


def main() -> None:
    given = parse(Export, __doc__)
    from taming_jax.interop.compvis_export import export_run
    from taming_jax.weights.state_dict import check_suffix

    check_suffix(given.out)
    check_output("--out", given.out)
    if not given.workdir.is_dir():
        raise UserError(f"there is no folder {given.workdir}; name a run's.")
    step = export_run(given.workdir, given.out, given.stage)
    print(f"{given.out} and {given.out.with_suffix('.yaml')} hold step {step} of {given.workdir}.")
