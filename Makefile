# `make demo` and `make test` each set up what they need in a fresh clone; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# NVIDIA's Python bindings and lean runtime, which tests hold our plugins against, on a CPU too. Without --no-deps they
# would ask for the whole of TensorRT, which no index has.
NVIDIA := tensorrt-cu13==11.4.0.106 tensorrt-cu13-bindings==11.4.0.106 tensorrt-lean-cu13-libs==11.4.0.106

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/stca demo --out demo-out

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stca needs Python 3.11 or newer; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,kernels,tensorrt-rtx,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(NVIDIA)
	touch $@

clean:
	rm -rf $(VENV) demo-out build .pytest_cache .mypy_cache .ruff_cache .hypothesis
