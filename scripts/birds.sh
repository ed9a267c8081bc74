#!/usr/bin/env bash
# Trains both stages on CUB-200-2011 birds at 256 px and draws samples. Requires a GPU.
exec bash "$(dirname "$0")/both.sh" birds "$@"
