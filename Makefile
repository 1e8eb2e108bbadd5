# A local environment with plain pip, and the main jobs in it. GNU make 3.81, as macOS has it, is enough.
#
#   make demo     environment, real model and text, activations, training, evaluation, report: in runs/demo
#   make test     environment and the whole test suite
#   make lint     environment, ruff and mypy
#   make test-compiled-tpu     kernels and the training step through the compiler for TPUs, which needs no TPU (Linux)
#   make test-compiled-cuda    kernels through the compilers for NVIDIA GPUs, which need no GPU (830 MB, Linux)
#   make bench    environment and the benchmarks; results in benchmarks/results/<device>/
#   make clean    removes the environment, caches and builds; runs/ stays
#
# PYTHON=python3.12 names the interpreter, VENV=DIR the environment, PYTEST_FLAGS="-m 'not slow'" goes to pytest.

VENV ?= .venv
DEMO ?= runs/demo
BENCHMARKS ?= import_time sparsemax bottleneck train_step loader end_to_end growth
RUN = $(VENV)/bin/python
VERSION = -c 'import sys; print("%d.%d" % sys.version_info[:2])'

# The first interpreter that is 3.11 or newer and really runs (a version manager's shim may exist and fail);
# one that can make environments goes before one that lacks its venv package.
ifndef PYTHON
PYTHON := $(shell for modules in 'venv, ensurepip' sys; do for python in python3.12 python3.11 python3; do \
	if $$python -c "import sys, $$modules; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; \
	then echo $$python; exit; fi; done; done)
else
FOUND := $(shell test ! -x $(RUN) || $(RUN) $(VERSION) 2>/dev/null)
WANTED := $(shell $(PYTHON) $(VERSION) 2>/dev/null)
ifeq ($(WANTED),)
$(error PYTHON=$(PYTHON) does not run; pass the name or path of a Python 3.11 or newer)
endif
ifneq ($(FOUND),)
ifneq ($(FOUND),$(WANTED))
$(error PYTHON=$(PYTHON) is Python $(WANTED) but $(VENV) was made with $(FOUND); pass another VENV=DIR or remove it)
endif
endif
endif

.PHONY: demo test test-compiled-tpu test-compiled-cuda lint bench clean

demo: $(VENV)/.installed-demo
	$(RUN) -m train.extract --out $(DEMO)/activations
	$(RUN) -m train --data $(DEMO)/activations --workdir $(DEMO) --steps 600 --checkpoint-every 200
	$(RUN) -m train.evaluate $(DEMO)
	@echo "report: $(abspath $(DEMO))/report.html"

test: $(VENV)/.installed-test
	$(RUN) -m pytest --numprocesses=logical --dist=loadfile $(PYTEST_FLAGS)

# An environment of its own: with libtpu installed, JAX looks for a TPU whenever it starts.
test-compiled-tpu:
	$(MAKE) VENV=$(VENV)-compiled-tpu $(VENV)-compiled-tpu/.installed-compiled-tpu
	JAX_PLATFORMS=cpu $(VENV)-compiled-tpu/bin/python -m pytest tests/compiled_tpu $(PYTEST_FLAGS)

# An environment of its own: with the plugin for CUDA installed, JAX looks for a GPU whenever it starts.
test-compiled-cuda:
	$(MAKE) VENV=$(VENV)-compiled-cuda $(VENV)-compiled-cuda/.installed-compiled-cuda
	$(VENV)-compiled-cuda/bin/python -m pytest tests/compiled_cuda $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.installed-demo
	for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$$name || exit 1; done

clean:
	if test -f $(VENV)/pyvenv.cfg; then rm -rf $(VENV); fi
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find jax_sae train benchmarks tests -name __pycache__ -type d -exec rm -rf {} +

# One stamp per extra of pyproject.toml, renewed when that file changes.
$(VENV)/.installed-%: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or pass PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "$(PYTHON) is not a working Python 3.11 or newer; pass another PYTHON=" >&2; exit 2; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -c "import venv, ensurepip" 2>/dev/null || \
		{ echo "$(PYTHON) lacks its venv module; install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing jax_sae[$*] into $(VENV): a few minutes the first time"
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
