#!/usr/bin/env bash
# CUB-200-2011 birds at 256 px, both stages, then samples: for a GPU.
exec bash "$(dirname "$0")/both.sh" birds "$@"
