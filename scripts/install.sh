#!/usr/bin/env bash
# Makes .venv beside this checkout and installs the package into it, with CUDA where a GPU is.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=""
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    # jax's CUDA 13 wheels need a driver that speaks CUDA 13; older ones take CUDA 12's.
    if nvidia-smi | grep -Eq 'CUDA Version: (1[3-9]|[2-9][0-9])'; then extra="[cuda13]"; else extra="[cuda12]"; fi
fi
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --editable ".$extra"
