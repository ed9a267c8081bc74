#!/usr/bin/env bash
# Trains both stages on your own pictures at 256 px and draws samples:
# `bash scripts/folder.sh FOLDER`. FOLDER holds one folder per class, or only pictures. Requires a
# GPU.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: bash scripts/folder.sh FOLDER [settings]; FOLDER holds your pictures." >&2
    exit 2
fi
if [ ! -d "$1" ]; then
    echo "$1 is not a folder; name the folder with your pictures." >&2
    exit 2
fi
pictures="$(cd "$1" && pwd)"
shift
exec bash "$(dirname "$0")/both.sh" folder --data.path "$pictures" "$@"
