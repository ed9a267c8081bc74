#!/usr/bin/env bash
# Runs all checks: creates .venv-test, installs the package and the test dependencies, then checks
# lint, formatting and types, and runs the tests with one process per core. Uses python3, or the
# Python in the variable PYTHON.
#
#   bash scripts/test.sh           the fast tests, which take a few minutes
#   bash scripts/test.sh --slow    all tests, which take half an hour on two cores
#
# The script passes other arguments to pytest.
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
