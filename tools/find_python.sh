#!/usr/bin/env bash
# Print the path of a CPython 3.12: $PYTHON, otherwise python3.12 or python3 on PATH, otherwise pyenv's newest.
set -euo pipefail

is_cpython_312() {
    "$1" -c 'import platform, sys; sys.exit((platform.python_implementation(), sys.version_info[:2]) != ("CPython", (3, 12)))' \
        >/dev/null 2>&1
}

if [[ -n "${PYTHON:-}" ]]; then
    is_cpython_312 "$PYTHON" || { echo "PYTHON=$PYTHON is not a CPython 3.12" >&2; exit 1; }
    command -v "$PYTHON"
    exit
fi

pyenv_versions=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python)
mapfile -t pyenv_versions < <(printf '%s\n' "${pyenv_versions[@]}" | sort --version-sort --reverse)
for candidate in python3.12 python3 "${pyenv_versions[@]}"; do
    # pyenv also puts shims for unselected versions on PATH; running those fails.
    if is_cpython_312 "$candidate"; then
        command -v "$candidate"
        exit
    fi
done
echo "no CPython 3.12 found: looked for python3.12 and python3 on PATH and for ~/.pyenv/versions/3.12*." >&2
echo "Install one (for example 'pyenv install 3.12'), or give its path: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
