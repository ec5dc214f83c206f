#!/usr/bin/env bash
# Make or update the virtual environment VENV for a machine with GPUs: set_up_gpu.sh VENV
# Exactly the versions of requirements/gpu/lock.txt, which holds SGLang's GPU packages too.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

tools/set_up.sh "$venv" only-uv
install=("$venv/bin/uv" pip install --quiet --python "$venv/bin/python")
"${install[@]}" --compile-bytecode --requirements requirements/pins.txt --requirements requirements/dev.txt \
    --constraints requirements/gpu/lock.txt
"${install[@]}" --no-deps --editable .
