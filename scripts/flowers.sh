#!/usr/bin/env bash
# Trains both stages on Oxford Flowers 102 at 256 px and draws samples. Requires a GPU.
exec bash "$(dirname "$0")/both.sh" flowers "$@"
