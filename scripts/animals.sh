#!/usr/bin/env bash
# Trains both stages on Animals-10 at 64 px and draws samples. Requires a GPU.
exec bash "$(dirname "$0")/both.sh" animals "$@"
