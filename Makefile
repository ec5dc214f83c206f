# make demo | test | test-all | check | format | lock; see CONTRIBUTING.md.
# PYTHON=/path/to/python3.12 chooses the interpreter, VENV=/path the virtual environment.

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=
export PYTHON
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# A finished set-up is reused until the requirements, the set-up scripts or the path of this folder change.
SET_UP_FILES := $(sort $(wildcard requirements/*.txt)) setup.py tools/set_up.sh
SET_UP := $(VENV)/.set-up-$(shell { pwd; cat $(SET_UP_FILES); } | sha256sum | cut -c1-16)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format lock

help:
	@echo "make demo      train a small model with HAPO on this machine's CPU"
	@echo "make test      run the tests, without the slow ones and those that need a GPU"
	@echo "make test-all  run all tests; those in tests/gpu need a GPU"
	@echo "make check     check lint, format and types"
	@echo "make format    format the code and fix lint errors with ruff"
	@echo "make lock      update the versions in requirements/lock-cpu.txt"

setup: $(SET_UP)

$(SET_UP):
	@rm -f $(VENV)/.set-up-*
	tools/set_up.sh $(VENV)
	@touch $@

# Written under another name first, so that interrupted training leaves no folder that looks complete.
runs/demo_model: | $(SET_UP)
	@rm -rf $@.partial
	$(BIN)/python tools/make_demo_model.py $@.partial
	@mv $@.partial $@

demo: $(SET_UP) runs/demo_model
	$(BIN)/megatron-hapo train configs/demo_cpu.yaml

test: $(SET_UP)
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(SET_UP)
	$(PYTEST) $(PYTEST_ARGS)

check: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(SET_UP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps the locked versions where the pins allow it; LOCK_ARGS=--upgrade takes the newest.
lock:
	tools/set_up.sh $(VENV) only-uv
	$(BIN)/uv pip compile --quiet --no-header --annotation-style line $(LOCK_ARGS) \
		--python $(BIN)/python --python-platform x86_64-manylinux_2_34 \
		--overrides requirements/gpu-only.txt requirements/pins.txt requirements/dev.txt \
		--output-file requirements/lock-cpu.txt
	@sed -i -e '/^ *#/d' -e '/^ *--/d' requirements/lock-cpu.txt
	@sed -i '1i # Every version of the CPU set-up, made by `make lock`: edit pins.txt or dev.txt, not this file.' \
		requirements/lock-cpu.txt
