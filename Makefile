# `make demo` and `make test` set everything up by themselves; the second call starts at once.
#   make demo PYTHON=python3.12        another interpreter
#   make demo CONSTRAINTS=/dev/null    today's newest versions instead of the pinned ones

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS      ?= dev,tasks

# Waiting threads of libgomp spin, which is ruinous when anything else uses the cores.
export GOMP_SPINCOUNT ?= 10000

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
MARK  := $(VENV)/.perilune

.PHONY: demo test lint format clean

demo: $(STAMP)
	"$(BIN)/perilune" run recipes/demo.toml

test: $(STAMP)
	"$(BIN)/python" -m pytest -q -n auto

lint: $(STAMP)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/basedpyright"
	"$(BIN)/lint-imports"
	"$(BIN)/codespell"
	"$(BIN)/deptry" .

format: $(STAMP)
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

clean:
	test ! -e "$(MARK)" || rm -rf "$(VENV)"
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# The stamp is written last: an environment without one is half-made and begun anew, one with an old one is brought up to
# date. The mark is written first: only a folder that has it is ever removed. make cannot quote the name of a target, so
# VENV must hold no spaces; the path of the project may.
$(STAMP): pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS))
	test -e "$@" || test ! -e "$(VENV)" || test -e "$(MARK)" || { echo "$(VENV) exists and is not this project's; choose another VENV" >&2; exit 2; }
	test -e "$@" || rm -rf "$(VENV)"
	mkdir -p "$(VENV)" && touch "$(MARK)"
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install -q --disable-pip-version-check -c "$(CONSTRAINTS)" -e '.[$(EXTRAS)]'
	touch "$@"
