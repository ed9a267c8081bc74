#!/usr/bin/env bash
# Trains both stages on MNIST with the sizes of the reference project, 200 epochs each, and draws
# samples. Requires a GPU.
exec bash "$(dirname "$0")/both.sh" mnist "$@"
