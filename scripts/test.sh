#!/usr/bin/env bash
# The whole check: makes .venv-test, installs the package and its tests' tools, then runs lint,
# format, types and tests, with one process per core. The environment is made by python3, or by the
# Python that the variable PYTHON names.
#
#   bash scripts/test.sh           the tests that take a few minutes in all
#   bash scripts/test.sh --slow    every test: half an hour on two cores
#
# Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/python.sh

marks="not slow"
for argument in "$@"; do
    shift
    if [ "$argument" = --slow ]; then
        marks=""
    else
        set -- "$@" "$argument"
    fi
done

make_environment .venv-test
.venv-test/bin/python -m pip install --quiet --editable ".[test]"
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
.venv-test/bin/mypy
.venv-test/bin/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder \
    -m "$marks" "$@"
