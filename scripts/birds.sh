#!/usr/bin/env bash
# CUB-200-2011 birds at 256 px, both stages, then samples: for a GPU. Settings given (but for --workdir) are passed on to
# both stages: --data.path FOLDER where there is no network. Run again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python train_vqgan.py --config birds "$@"
.venv/bin/python train_prior.py --config birds "$@"
.venv/bin/python scripts/sample.py --workdir runs/birds --out runs/birds/figures/sample_grid.png
