# Sourced by install.sh and test.sh.

make_environment() { # FOLDER: creates a virtual environment there unless it holds a working one
    local check='import sys; sys.exit(sys.version_info < (3, 11))' version
    local python="${PYTHON:-python3}"
    if [ -x "$1/bin/python" ] && "$1/bin/python" -c "$check"; then
        return
    fi
    if ! version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"; then
        echo "$python cannot be run: taming_jax needs Python 3.11 or later. Choose it with" \
            "PYTHON=python3.12 bash $0." >&2
        exit 2
    fi
    if ! "$python" -c "$check"; then
        echo "Python $version is too old: taming_jax needs Python 3.11 or later. Choose it with" \
            "PYTHON=python3.12 bash $0." >&2
        exit 2
    fi
    "$python" -m venv --clear "$1"
}
