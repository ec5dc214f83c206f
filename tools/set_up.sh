#!/usr/bin/env bash
# Make or update the virtual environment VENV for a machine without a GPU: set_up.sh VENV [only-uv]
# Exactly the versions of requirements/lock-cpu.txt; SGLang's GPU-only packages are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
uv_version=0.13.8

if ! "$venv/bin/python" -c '' 2>/dev/null; then
    python=$(tools/find_python.sh)
    echo "set-up: $venv with $python (about 7 GB, a few minutes the first time)"
    "$python" -m venv --clear "$venv"
fi
if [[ "$("$venv/bin/uv" --version 2>/dev/null)" != "uv $uv_version"* ]]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
fi
[[ "${2:-}" != only-uv ]] || exit 0
install=("$venv/bin/uv" pip install --quiet --python "$venv/bin/python")
# Where PYTHONDONTWRITEBYTECODE is set every process would compile torch, Megatron and SGLang anew: most of its start.
"${install[@]}" --compile-bytecode --requirements requirements/pins.txt --requirements requirements/dev.txt \
    --overrides requirements/gpu-only.txt --constraints requirements/lock-cpu.txt
"${install[@]}" --no-deps --editable .
