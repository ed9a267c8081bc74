#!/usr/bin/env bash
# Trains both stages of a preset and draws a grid of samples, in runs/NAME:
# `bash scripts/both.sh NAME [settings]`. The settings apply to both stages, and may be any but
# --workdir. Run the same command again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
    echo "usage: bash scripts/both.sh NAME [settings]; NAME is a preset." >&2
    exit 2
fi
name="$1"
shift
for argument in "$@"; do
    if [[ "$argument" == --workdir* ]]; then
        echo "This script trains in runs/$name; to set --workdir, run train_vqgan.py instead." >&2
        exit 2
    fi
done
echo "Installing into .venv …"
bash scripts/install.sh
source scripts/cpu.sh
.venv/bin/python train_vqgan.py --config "$name" --workdir "runs/$name" "$@"
.venv/bin/python train_prior.py --config "$name" --workdir "runs/$name" "$@"
.venv/bin/python scripts/sample.py --workdir "runs/$name" --out "runs/$name/figures/sample_grid.png"
