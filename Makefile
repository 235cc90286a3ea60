# `make demo` and `make test` each set up what they need in a fresh clone; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run the tests; 0 runs them in one, with a debugger if need be.
WORKERS ?= auto
READY := $(VENV)/.ready
# NVIDIA's Python bindings and lean runtime, which tests hold our plugins against, on a CPU too; and TensorRT's headers,
# which kernel-lens carries. Without --no-deps they would ask for the whole of TensorRT, which no index has, and more.
NVIDIA := tensorrt-cu13==11.4.0.106 tensorrt-cu13-bindings==11.4.0.106 tensorrt-lean-cu13-libs==11.4.0.106 \
	kernel-lens==2.0.1
# Triton's own client, which drives our server in tests, and what it asks for but for an ml_dtypes older than ours.
TRITON := tritonclient==2.73.0 geventhttpclient==2.6.1 gevent==26.9.0 greenlet==3.5.6 zope.event==6.2 \
	zope.interface==8.7 brotli==1.2.1 certifi==2026.10.19.post1 urllib3==2.8.0 python-rapidjson==1.25

.PHONY: demo test lint api image clean

demo: $(READY)
	$(BIN)/stca demo --out demo-out

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API reference, from the docstrings of the modules that users import.
API := stca.runtime stca.export.to_onnx stca.export.reference.config stca.export.reference.checkpoint stca.bundle \
	stca.manifest stca.specs stca.errors stca.export.pipeline stca.checks.verify \
	stca.checks.bench stca.engines.build stca.engines.refit stca.report

api: $(READY)
	$(BIN)/pdoc --docformat google -o build/api $(API)

image:
	docker build -t stca .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stca needs Python 3.11 or newer; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,report,cli,sign,serve,kernels,tensorrt-rtx,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(NVIDIA) $(TRITON)
	touch $@

clean:
	rm -rf $(VENV) demo-out build .pytest_cache .mypy_cache .ruff_cache .hypothesis
