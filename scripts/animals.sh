#!/usr/bin/env bash
# Animals-10 at 64 px, both stages, then samples: for a GPU. Settings given (but for --workdir) are passed on to
# both stages: --data.path FOLDER where there is no network. Run again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python train_vqgan.py --config animals "$@"
.venv/bin/python train_prior.py --config animals "$@"
.venv/bin/python scripts/sample.py --workdir runs/animals --out runs/animals/figures/sample_grid.png
