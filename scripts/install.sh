#!/usr/bin/env bash
# Creates .venv in this checkout and installs the package into it, with CUDA if there is a GPU. Uses
# python3, or the Python in the variable PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/python.sh

extra=""
if [[ "$(nvidia-smi -L 2>/dev/null || true)" == *GPU* ]]; then
    # JAX's CUDA 13 wheels need a driver that supports CUDA 13; use CUDA 12 with older drivers.
    if [[ "$(nvidia-smi 2>/dev/null || true)" =~ CUDA\ Version:\ *([0-9]+) && ${BASH_REMATCH[1]} -ge 13 ]]; then
        extra="[cuda13]"
    else
        extra="[cuda12]"
    fi
fi
make_environment .venv
.venv/bin/python -m pip install --quiet --editable ".$extra"
