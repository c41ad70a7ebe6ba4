# The first two targets work alone on a fresh machine with Python 3.11+, git and make.
#
#   make run        compare on MRI volumes (ten seeds, nothing tuned), fine-tune, save, reload, merge, verify; offline
#   make test       the test-suite without the slow tests
#   make test-slow  the slow tests, PEFT's own among them
#   make lint       ruff and mypy
#   make bench      the benchmarks
#   make docs       regenerate what is generated, then run every example of the docs
#   make site       the documentation as a website in site/; a broken link or a missing docstring fails

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
# A pretrained 3-D U-Net and few labelled volumes: what adapters of N-dimensional weights are for. FLoRA is
# ahead of LoRA there at equal parameters, beyond the interval over ten seeds. About five minutes on two cores.
CONFIG ?= examples/hippocampus/hippocampus.yaml
OUTPUT ?= outputs/$(basename $(notdir $(CONFIG)))
COMPARE ?= --methods flora-gradient,lora,full --seeds 0,1,2,3,4,5,6,7,8,9

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test test-slow lint bench docs site

help:
	@sed -n 's/^#   //p' Makefile

install: $(DEV)

# Written last, so that an interrupted installation is taken up again; a venv without a working pip is built anew.
$(RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[medical]'
	@touch $@

$(DEV): $(RUN)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

run: $(RUN)
	$(BIN)/flora compare $(CONFIG) $(COMPARE)
	$(BIN)/flora train $(CONFIG) --overwrite
	$(BIN)/flora eval $(OUTPUT)
	$(BIN)/flora merge $(OUTPUT) --out $(OUTPUT)-merged --overwrite

test: $(DEV)
	$(BIN)/python -m pytest -n 2

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python benchmarks/run.py

docs: $(DEV)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pytest tests/test_docs.py

site: $(DEV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict
