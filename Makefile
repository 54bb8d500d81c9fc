# make quickstart    fine-tune a small model with LOMO, from data to an exported model
# make test          run every test but those of slurm
# make test-slurm    run those on a real slurm, which is installed where that is possible
# All set up the virtual environment when it is missing or stale.
#
# PYTHON=python3.12  the interpreter of a new environment        VENV=.venv  its place
# TORCH=pin|keep     install torch as constraints.txt pins it | use the torch of $(PYTHON)
#                    (default: keep a torch >= 2.11 that $(PYTHON) imports, else pin)

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(abspath $(VENV))/bin
# their tests start as many processes as there are cores, or more: two at a time, and nothing beside them
SEVERAL := tests/layouts tests/launch tests/slurm
PROJECTS := $(dir $(wildcard collie_*/pyproject.toml collie_*/*/pyproject.toml))

.PHONY: setup quickstart test test-slurm lint wheels bench docs clean

setup:
	@$(PYTHON) tools/make_venv.py --venv "$(VENV)" $(if $(TORCH),--torch $(TORCH)) \
		$(if $(filter-out file,$(origin PYTHON)),--this-python)

quickstart: setup
	$(BIN)/python examples/quickstart/run.py

test: setup
	$(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile $(addprefix --ignore=,$(SEVERAL))
	$(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile $(filter-out tests/slurm,$(SEVERAL))

test-slurm: setup
	@tests/slurm/install.sh
	$(BIN)/python -m pytest -q -rs -p no:cacheprovider tests/slurm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

wheels: setup
	rm -rf dist
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist $(addprefix ./,$(PROJECTS)) .
	@ls dist

bench: setup
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: setup
	$(BIN)/python tools/known_plugins.py
	$(BIN)/python tools/hook_tables.py
	$(BIN)/python tools/config_table.py
	$(BIN)/python tools/layout_tables.py

clean:
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache "$(VENV)"
