# Two commands are all the set-up: `make demo` runs the main job, `make test` everything the project checks.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
COMPARED := fedavg,fedprox,fedmoe,pfl_moe,by_use,fedalign_paper,fedalign_moe
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-sites compare test test-browser test-families test-installed test-kills test-sites test-sites-all models examples docs check format bench clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: Python 3.11 or newer is needed, for example: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing fedalign-moe into $(VENV) ..."
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.flower: $(VENV)/.package
	@echo "Installing Flower ..."
	@$(PIP) --editable '.[flower]'
	@touch $@

$(VENV)/.simulation: $(VENV)/.tools
	@echo "Installing Flower's simulation engine ..."
	@$(PIP) --editable '.[dev,simulation]'
	@touch $@

$(VENV)/.tools: $(VENV)/.package
	@echo "Installing the project's own checks ..."
	@$(PIP) --editable '.[dev]'
	@touch $@

venv: $(VENV)/.tools ## the virtual environment, with everything

demo: $(VENV)/.package ## ten clients, one small MoE, FedAlign-MoE: a few minutes
	@$(BIN)/fedalign run demo --out runs/demo --overwrite

demo-sites: $(VENV)/.flower ## three sites on this machine behind Flower, with TLS and keys: a few minutes
	@$(BIN)/python -m fedalign.federation.flower.three_sites --out runs/demo-sites

test: $(VENV)/.tools check ## set up, then format, lint, types, import contracts and tests

check: ## what `make test` checks, in the environment that is there
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

test-browser: $(VENV)/.tools ## the report in headless Chromium (apt-get install chromium chromium-driver)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m browser

test-installed: $(VENV)/.tools ## what a newcomer has: the wheel alone, a new algorithm, the notebooks
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m installed

test-sites: $(VENV)/.simulation ## real Flower processes on loopback: keys, kills, faults, equal engines
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m 'sites and not variant' --numprocesses 2 --dist loadfile --durations 20 --durations-min 30

test-sites-all: $(VENV)/.simulation ## those, and all others of their kinds: which process is killed, by which signal, when
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m sites

test-families: $(VENV)/.tools ## every model family: capture, groups, a round, loading with plain libraries; docs/models.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.families

test-kills: $(VENV)/.tools ## runs and exports killed 140 times, and 20 full disks: what they leave is made whole again
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills

models: $(VENV)/.tools ## write docs/models.md from what the tests of the families give
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.families --write

examples: $(VENV)/.package ## write examples/every_key.toml from what the fields of the configuration say
	@$(BIN)/python -m fedalign.config.toml > examples/every_key.toml

docs: $(VENV)/.tools ## the pages of docs/ as a site in site/; warnings are errors, links are checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

compare: $(VENV)/.package ## seven algorithms, three seeds, a small model: under 25 minutes on two cores; goes on where it stopped
	@$(BIN)/fedalign compare examples/compare.toml --algorithms $(COMPARED) --seeds 3 --out runs/compare

format: ## rewrite the sources as `check` wants them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.package ## every benchmark, one after another
	@for script in client_step server_sum plan_scale; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean: ## remove what was made
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
