# make demo | test | test-all | test-gpu | check | format | lock; see CONTRIBUTING.md.
# PYTHON=/path/to/python3.12 chooses the interpreter, VENV=/path the virtual environment, WORKERS=N how many test files
# run at once.

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=
WORKERS ?= 2
export PYTHON
GPU_VENV ?= .venv-gpu
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# A finished set-up is reused until the requirements, the set-up scripts or the path of this folder change.
SET_UP_FILES := $(sort $(wildcard requirements/*.txt)) setup.py tools/set_up.sh
SET_UP := $(VENV)/.set-up-$(shell { pwd; cat $(SET_UP_FILES); } | sha256sum | cut -c1-16)
GPU_SET_UP := $(GPU_VENV)/.set-up-$(shell { pwd; cat $(SET_UP_FILES) requirements/gpu/*.txt tools/set_up_gpu.sh; } \
	| sha256sum | cut -c1-16)

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo test test-all test-gpu check format lock

help:
	@echo "make demo      train a small model with HAPO on this machine's CPU"
	@echo "make test      run the tests, without the slow ones and those that need a GPU"
	@echo "make test-all  run all tests that need no GPU"
	@echo "make test-gpu  run the tests in tests/gpu, in an environment with SGLang's GPU packages"
	@echo "make check     check lint, format and types"
	@echo "make format    format the code and fix lint errors with ruff"
	@echo "make lock      update the versions in requirements/lock-cpu.txt and gpu/lock.txt"

setup: $(SET_UP)

$(SET_UP):
	@rm -f $(VENV)/.set-up-*
	tools/set_up.sh $(VENV)
	@touch $@

setup-gpu: $(GPU_SET_UP)

$(GPU_SET_UP):
	@rm -f $(GPU_VENV)/.set-up-*
	tools/set_up_gpu.sh $(GPU_VENV)
	@touch $@

# Written under another name first, so that interrupted training leaves no folder that looks complete.
runs/demo_model: | $(SET_UP)
	@rm -rf $@.partial
	$(BIN)/python tools/make_demo_model.py $@.partial
	@mv $@.partial $@

demo: $(SET_UP) runs/demo_model
	$(BIN)/megatron-hapo train configs/demo_cpu.yaml

test: $(SET_UP)
	$(PYTEST) -m "not slow and not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-all: $(SET_UP)
	$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

test-gpu: $(GPU_SET_UP)
	$(GPU_VENV)/bin/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

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
	@grep -v '^cuda-bindings==' requirements/lock-cpu.txt > $(VENV)/gpu-constraints.txt  # cuda-python has its own
	$(BIN)/uv pip compile --quiet --no-header --no-annotate $(LOCK_ARGS) \
		--python $(BIN)/python --python-platform x86_64-manylinux_2_34 \
		--constraints $(VENV)/gpu-constraints.txt \
		requirements/pins.txt requirements/dev.txt --output-file requirements/gpu/lock.txt
	@sed -i -e '/^ *#/d' -e '/^ *--/d' requirements/gpu/lock.txt
	@sed -i '1i # Every version of the GPU set-up, made by `make lock`: edit pins.txt or dev.txt, not this file.' \
		requirements/gpu/lock.txt
