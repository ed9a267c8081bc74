#!/usr/bin/env bash
# Makes .venv beside this checkout and installs the package into it, with CUDA where a GPU is. The
# environment is made by python3, or by the Python that the variable PYTHON names.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/python.sh

extra=""
if [[ "$(nvidia-smi -L 2>/dev/null || true)" == *GPU* ]]; then
    # jax's CUDA 13 wheels need a driver that speaks CUDA 13; older ones take CUDA 12's.
    if [[ "$(nvidia-smi 2>/dev/null || true)" =~ CUDA\ Version:\ *([0-9]+) && ${BASH_REMATCH[1]} -ge 13 ]]; then
        extra="[cuda13]"
    else
        extra="[cuda12]"
    fi
fi
make_environment .venv
.venv/bin/python -m pip install --quiet --editable ".$extra"
