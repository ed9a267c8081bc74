#!/usr/bin/env bash
# MNIST at the reference's sizes, both stages of 200 epochs, then samples: for a GPU.
exec bash "$(dirname "$0")/both.sh" mnist "$@"
