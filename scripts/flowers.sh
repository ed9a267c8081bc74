#!/usr/bin/env bash
# Oxford Flowers 102 at 256 px, both stages, then samples: for a GPU. Settings given (but for --workdir) are passed on to
# both stages: --data.path FOLDER where there is no network. Run again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python train_vqgan.py --config flowers "$@"
.venv/bin/python train_prior.py --config flowers "$@"
.venv/bin/python scripts/sample.py --workdir runs/flowers --out runs/flowers/figures/sample_grid.png
