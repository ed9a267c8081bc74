#!/usr/bin/env bash
# MNIST at the reference's sizes, both stages of 200 epochs, then samples: for a GPU. Run again to
# resume.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python train_vqgan.py --config mnist
.venv/bin/python train_prior.py --config mnist
.venv/bin/python scripts/sample.py --workdir runs/mnist --out runs/mnist/figures/sample_grid.png
