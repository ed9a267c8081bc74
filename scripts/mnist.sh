#!/usr/bin/env bash
# Trains both stages on MNIST with the reference's sizes, 200 epochs each, and draws samples.
# Requires a GPU.
exec bash "$(dirname "$0")/both.sh" mnist "$@"
