#!/usr/bin/env bash
# From a fresh clone to pictures: installs into .venv, then trains stage 1 of the mnist_tiny preset,
# about three minutes on two CPU cores. Settings given are passed on; run again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Installing into .venv …"
bash scripts/install.sh
.venv/bin/python train_vqgan.py --config mnist_tiny "$@"
echo "Stage 2, about four minutes: .venv/bin/python train_prior.py --config mnist_tiny"
