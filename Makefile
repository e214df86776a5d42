# The commands of the project; the same at home and in CI. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Threads that wait for work must not burn the cores that others need.
export OMP_WAIT_POLICY := PASSIVE
.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check format build serve bench clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with everything that running, testing and checking need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Ingot needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# xgrammar asks for triton, a gigabyte that it needs for masks on a GPU: its own, which are not used here.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps xgrammar apache-tvm-ffi
	@touch $@

demo: setup  ## build the demo's ladder, print it, pin `demo` to the chosen artifact and generate from it
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	@$(BIN)/ingot verify
	@$(BIN)/ingot ladder demo --pin demo
	@question="$$($(BIN)/python -m demo.world --question)"; echo "asked:    $$question"; \
	    printf 'answered: '; $(BIN)/ingot generate artifact=demo --chat "$$question"

test: setup  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

soak: setup  ## run every property at its full count and append the counts to benchmarks/results/soak.csv
	$(BIN)/python -m pytest -m soak --soak

check: setup  ## lint, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

build: setup  ## build what params.yaml asks for, and a page about each artifact
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	@$(BIN)/ingot verify
	@$(BIN)/ingot report

serve: setup  ## serve an artifact: make serve ARTIFACT=demo
	$(BIN)/ingot serve artifact=$(or $(ARTIFACT),demo)

bench: setup  ## run the benchmarks that need no GPU; rows go to benchmarks/results/
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.calibration_memory
	$(BIN)/python -m benchmarks.conversion
	$(BIN)/ingot bench memory shape=internlm7b device=cpu

clean:  ## remove what builds left behind (.venv, build/ and store/ stay unless named)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache outputs multirun
