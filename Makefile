# From a bare clone: Python 3.10 or newer, a C++ compiler and make are enough. Everything else goes into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Temporary files go on the checkout's disk: where /tmp is memory, paged state would have nowhere to be paged out to.
export TMPDIR ?= $(CURDIR)/build/tmp

# Threads that wait sleep instead of spinning; on a machine that does other things too, several times faster.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize lint bench docs site dist clean

help:
	@echo "make demo    the memory of an 8-billion-parameter model, then five optimizers on one language model"
	@echo "make test    lint, types, doctests and the test suite"
	@echo "make sanitize  the CPU kernels under the sanitizers (some minutes)"
	@echo "make lint    ruff, mypy and the layers"
	@echo "make site    the calculator as static files (Pyodide from npm, or PYODIDE=folder), in build/calculator"
	@echo "make bench   start-up, time of a step, and loss by format (half an hour)"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make dist    the source distribution and a wheel with the CPU kernels, in dist"
	@echo "make clean   remove the environment and what the tools left behind"

# An estimate whose answer is that nothing fits ends with exit code 1, which is no failure of the demo.
demo: $(READY)
	$(BIN)/memopt estimate 8B --gpu 24GiB || test $$? -eq 1
	$(BIN)/memopt train

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --doctest-modules --doctest-ignore-import-errors memopt estimators tests

# The kernels under the address, undefined-behaviour and thread sanitizers: minutes, and a compiler that has them.
sanitize: $(READY)
	$(BIN)/python -m pytest -m slow tests/kernels/test_kernels_sanitizers.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/step_cpu.py
	$(BIN)/python benchmarks/step_users.py
	$(BIN)/python benchmarks/step_small.py
	$(BIN)/python benchmarks/step_released.py
	$(BIN)/python benchmarks/many_threads.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/offload.py
	$(BIN)/python benchmarks/watch_cost.py
	$(BIN)/python benchmarks/masters.py
	$(BIN)/python benchmarks/masters_step.py

# The site needs no torch: an environment of its own.
docs: build/docs-venv/.ready
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict

build/docs-venv/.ready: docs/requirements.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install --quiet --requirement docs/requirements.txt
	@touch $@

# The wheel is made from the source distribution, which so shows that it is whole.
dist: build/dist-venv/.ready
	build/dist-venv/bin/python -m build --outdir dist .

build/dist-venv/.ready:
	$(PYTHON) -m venv build/dist-venv
	build/dist-venv/bin/python -m pip install --quiet build
	@touch $@

# Pyodide is taken from PYODIDE, or from npm into build/; the page loads nothing from elsewhere.
PYODIDE_VERSION := 314.0.7
PYODIDE ?= build/npm/node_modules/pyodide

site: $(READY)
	@test -e "$(PYODIDE)" || command -v npm >/dev/null || { \
	  echo "make site needs Pyodide: install npm, or say PYODIDE=folder of its npm package, unpacked" >&2; exit 1; }
	@test -e "$(PYODIDE)" || npm install --no-audit --no-fund --prefix build/npm pyodide@$(PYODIDE_VERSION)
	$(BIN)/memopt web --write build/calculator --pyodide "$(PYODIDE)"

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "memopt needs Python 3.10 or newer: make PYTHON=python3.12")'
	@mkdir -p "$$TMPDIR"
	@echo "Installing into $(VENV); this happens once and takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,test]'
	@touch $@
