#!/usr/bin/env bash
# From a fresh clone to new digits: installs into .venv, trains both stages of the mnist_tiny preset,
# about seven minutes on two CPU cores, and draws samples. Settings given (but for --workdir) are
# passed on to both stages; run again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

for given in "$@"; do
    if [[ "$given" == --workdir* ]]; then
        echo "quickstart.sh trains into runs/mnist_tiny; use train_vqgan.py for another --workdir." >&2
        exit 2
    fi
done
run=runs/mnist_tiny
echo "Installing into .venv …"
bash scripts/install.sh
.venv/bin/python train_vqgan.py --config mnist_tiny --workdir "$run" "$@"
.venv/bin/python train_prior.py --config mnist_tiny --workdir "$run" "$@"
.venv/bin/python scripts/sample.py --workdir "$run" --out "$run/figures/sample_grid.png"
