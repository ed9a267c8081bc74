#!/usr/bin/env bash
# MNIST at the reference's sizes, 200 epochs: for a GPU. Settings given are passed on; run again to
# resume.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
.venv/bin/python train_vqgan.py --config mnist "$@"
