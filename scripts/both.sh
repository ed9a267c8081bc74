#!/usr/bin/env bash
# Both stages of a preset, then a grid of samples: `bash scripts/both.sh NAME [settings]`, into
# runs/NAME. Settings (but for --workdir) are passed on to both stages; run again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
    echo "usage: bash scripts/both.sh NAME [settings]; NAME is a preset." >&2
    exit 2
fi
name="$1"
shift
for given in "$@"; do
    if [[ "$given" == --workdir* ]]; then
        echo "This script trains into runs/$name; use train_vqgan.py for another --workdir." >&2
        exit 2
    fi
done
echo "Installing into .venv …"
bash scripts/install.sh
source scripts/cpu.sh
.venv/bin/python train_vqgan.py --config "$name" --workdir "runs/$name" "$@"
.venv/bin/python train_prior.py --config "$name" --workdir "runs/$name" "$@"
.venv/bin/python scripts/sample.py --workdir "runs/$name" --out "runs/$name/figures/sample_grid.png"
