#!/usr/bin/env bash
# From a fresh clone to new digits: installs into .venv, trains both stages of the mnist_tiny preset,
# about eight minutes on two CPU cores, and draws samples. Run again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Installing into .venv …"
bash scripts/install.sh
.venv/bin/python train_vqgan.py --config mnist_tiny
.venv/bin/python train_prior.py --config mnist_tiny
.venv/bin/python scripts/sample.py --workdir runs/mnist_tiny --out runs/mnist_tiny/figures/grid.png
