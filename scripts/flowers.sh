#!/usr/bin/env bash
# Oxford Flowers 102 at 256 px, both stages, then samples: for a GPU.
exec bash "$(dirname "$0")/both.sh" flowers "$@"
