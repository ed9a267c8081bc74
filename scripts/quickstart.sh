#!/usr/bin/env bash
# Installs the package from a fresh clone, trains both stages of mnist_tiny, which takes six to
# twelve minutes on two CPU cores, and draws samples.
exec bash "$(dirname "$0")/both.sh" mnist_tiny "$@"
