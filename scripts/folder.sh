#!/usr/bin/env bash
# Your own pictures at 256 px, both stages, then samples, for a GPU: `bash scripts/folder.sh FOLDER`.
# FOLDER holds a folder a class, or pictures alone.
set -euo pipefail

if [ $# -lt 1 ] || [ ! -d "$1" ]; then
    echo "usage: bash scripts/folder.sh FOLDER [settings]; FOLDER holds your pictures." >&2
    exit 2
fi
pictures="$(cd "$1" && pwd)"
shift
exec bash "$(dirname "$0")/both.sh" folder --data.path "$pictures" "$@"
