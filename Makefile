# Needs python3 (3.11 or newer) and make; everything else is installed into .venv, once per change of the two files
# that the stamp depends on.
#
#   make compare [ARGS="suite=quick methods=[backprop,pipedream] seeds=1"]
#   make test      lint, format, types, fast tests: what CI runs
#   make slow      the slow tests
#   make gpu       the tests that need a CUDA device
#   make setup     only the environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup compare test slow gpu

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.11 ..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); } || \
		{ rm -rf $(VENV); echo "error: 'python3 -m venv' failed; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,rl,dev]'
	@touch $@

compare: $(STAMP)
	@out=results/compare-$$(date +%Y%m%d-%H%M%S); \
	$(BIN)/decoupled compare $(ARGS) --out "$$out" && echo "report: $$out/report.html"

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu" $(ARGS)

# Side by side first, then what measures times and must be alone. pytest's exit code 5 says that no test was selected.
slow: $(STAMP)
	@$(BIN)/python -m pytest -n auto -m "slow and not (gpu or alone)" $(ARGS) || test $$? -eq 5
	@$(BIN)/python -m pytest -m "slow and alone and not gpu" $(ARGS) || test $$? -eq 5

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(ARGS)
