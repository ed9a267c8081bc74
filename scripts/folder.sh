#!/usr/bin/env bash
# Your own pictures, both stages, then samples: for a GPU.
#
#     bash scripts/folder.sh FOLDER
#
# FOLDER holds a folder a class, or pictures alone; further settings are passed on to both stages.
# Run again to resume.
set -euo pipefail

if [ $# -lt 1 ] || [ ! -d "$1" ]; then
    echo "usage: bash scripts/folder.sh FOLDER [settings]; FOLDER holds your pictures." >&2
    exit 2
fi
pictures="$(cd "$1" && pwd)"
shift
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python train_vqgan.py --config folder --data.path "$pictures" "$@"
.venv/bin/python train_prior.py --config folder "$@"
.venv/bin/python scripts/sample.py --workdir runs/folder --out runs/folder/figures/sample_grid.png
