# Every target works on a fresh clone: it makes the virtual environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
# How torch comes: a CPU build here. For another one see "Choosing a torch build" in README.md.
TORCH ?= torch==2.13.0
MODEL ?= models/baton-demo

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo serve check test unit lint types clean exact overhead memory docs

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	touch $@

install: $(INSTALLED) ## Set up .venv and install Baton into it

demo: $(INSTALLED) ## Ask the demo model questions, prefill and decode in separate processes
	$(BIN)/python examples/demo.py --model $(MODEL)

serve: $(INSTALLED) ## Serve the demo model on port 8000 until Ctrl-C
	$(BIN)/baton serve --model $(MODEL)

check: lint types unit ## Lint, types and unit tests, in under 2 minutes

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/pytest -q tests/unit

test: $(INSTALLED) ## All tests: unit, property, model check, numerics, real processes, faults
	$(BIN)/pytest -q tests/unit tests/property tests/model_check
	$(BIN)/pytest -q tests/numerics
	$(BIN)/pytest -q tests/integration tests/faults

exact: $(INSTALLED) ## Ask a running 1P1D every question of the demo model's list; print its exact-answer rate
	$(BIN)/python examples/exact_answers.py --model $(MODEL)

overhead: $(INSTALLED) ## Measure what a step, a streamed token and an RPC round trip cost
	$(BIN)/python bench/overhead.py

memory: $(INSTALLED) ## Measure a worker's peak memory on a random 0.5 B model
	$(BIN)/python bench/memory.py

docs: $(INSTALLED) ## Write the pages that are made from the code: configuration, metrics
	$(BIN)/python docs/generate.py

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
