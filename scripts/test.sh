#!/usr/bin/env bash
# The whole check: makes .venv-test, installs the package and its tests' tools, then lint, format,
# types and tests, a process a core. What is given is passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv-test/bin/python ] || "${PYTHON:-python3}" -m venv .venv-test
.venv-test/bin/python -m pip install --quiet --editable ".[test]"
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
.venv-test/bin/mypy
.venv-test/bin/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder \
    "$@"
