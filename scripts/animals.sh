#!/usr/bin/env bash
# Animals-10 at 64 px, both stages, then samples: for a GPU.
exec bash "$(dirname "$0")/both.sh" animals "$@"
