# Every target works on a fresh clone: it makes the virtual environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
# How torch comes: a CPU build here. For another one see "Choosing a torch build" in README.md.
TORCH ?= torch==2.13.0
MODEL ?= models/baton-demo
# Where `make peers` builds other engines.
PEERS ?= .peers
# How many times `make fuzz` changes a message of the wire protocol.
MUTATIONS ?= 100000

# As in setup.py.
CHECK_FLAGS := -O3 -std=c++17 -fopenmp -Wall -Wextra -ffp-contract=off -fno-math-errno \
	-fno-strict-aliasing -Icsrc
CHECKED := csrc/portable.cpp csrc/dispatch.cpp tests/cross/check_kernels.cpp

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WITH_NIXL := $(VENV)/.with-nixl

.DEFAULT_GOAL := help
.PHONY: help install kernels neon demo serve check test unit lint types clean wheel sim exact overhead roofline step ready memory peers compare goodput twin-vs-real fabric reproduce fuzz docs nixl-test nixl-soak

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	touch $@

install: $(INSTALLED) ## Set up .venv and install Baton into it

demo: $(INSTALLED) ## Ask the demo model questions, prefill and decode in separate processes
	$(BIN)/python examples/demo.py --model $(MODEL)

serve: $(INSTALLED) ## Serve the demo model on port 8000 until Ctrl-C
	$(BIN)/baton serve --model $(MODEL)

# The unit tests on one core, the others beside them.
check: $(INSTALLED) ## Lint, types and unit tests, in under two minutes
	@$(MAKE) --no-print-directory -j2 --output-sync=line unit types lint

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/pytest -q tests/unit

test: $(INSTALLED) ## All tests: unit, property, model check, simulation, numerics, real processes, faults
	$(BIN)/pytest -q tests/unit tests/property tests/model_check tests/sim
	$(BIN)/pytest -q tests/numerics
	$(BIN)/pytest -q tests/integration tests/faults

# Without its dependencies: torch is here already, and NIXL takes no more than numpy without CUDA.
$(WITH_NIXL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt nixl-cu13
	touch $@

nixl-test: $(WITH_NIXL) ## Test the nixl transport with the real package, between processes and namespaces
	$(BIN)/pytest -q --confcutdir=tests/nixl tests/nixl

nixl-soak: $(WITH_NIXL) ## Read through NIXL 200,000 times; a minute or two
	$(BIN)/python tests/nixl/nixl_soak.py

# What an earlier build left would be packed as well.
wheel: $(INSTALLED) ## Build a wheel into build/wheel, and see that it has all it needs
	rm -rf build/wheel build/lib* build/bdist* build/temp*
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python tests/check_wheel.py build/wheel/*.whl

kernels: $(INSTALLED) ## Build the CPU kernels in place, after a change in csrc
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python setup.py --quiet build_ext --inplace

neon: ## Check the kernels for 64-bit Arm under emulation (g++-aarch64-linux-gnu, qemu-user-static)
	mkdir -p build
	aarch64-linux-gnu-g++ $(CHECK_FLAGS) -static csrc/neon.cpp $(CHECKED) -o build/check_neon
	qemu-aarch64-static build/check_neon neon build/neon.bin

SEEDS ?= 100000
sim: $(INSTALLED) ## Simulate whole deployments on a virtual clock, SEEDS=100000 histories with faults
	PYTHONPATH=tests $(BIN)/python -m sim.run --seeds $(SEEDS)

exact: $(INSTALLED) ## Ask a running 1P1D every question of the demo model's list; print its exact-answer rate
	$(BIN)/python examples/exact_answers.py --model $(MODEL)

overhead: $(INSTALLED) ## Measure what a step, a streamed token and an RPC round trip cost
	$(BIN)/python bench/overhead.py

roofline: $(INSTALLED) ## Measure the CPU kernels beside what the machine allows
	$(BIN)/python bench/kernels.py

step: $(INSTALLED) ## Take a decode step of a random 0.5 B model apart: where its time goes
	$(BIN)/python bench/step.py --peers $(PEERS)

ready: $(INSTALLED) ## Measure how long a random 0.5 B model takes from the command to ready
	$(BIN)/python bench/start.py --peers $(PEERS)

memory: $(INSTALLED) ## Measure a worker's peak memory on a random 0.5 B model
	$(BIN)/python bench/memory.py

peers: $(INSTALLED) ## Build the engines to compare with (llama.cpp, vLLM) below .peers; 10 minutes, 4 GB
	PYTHONPATH=bench $(BIN)/python -m parts.build_peers $(PEERS) --torch "$(TORCH)"

compare: $(INSTALLED) ## Measure Baton beside transformers, llama.cpp and vLLM: offline, then over HTTP
	$(BIN)/python bench/peers.py --peers $(PEERS) --json results/peers.json
	$(BIN)/python bench/peers.py --peers $(PEERS) --http --model 0.5B --json results/peers-http.json

goodput: $(INSTALLED) ## Measure goodput of 1P1D, 2U, 1U and of other engines; an hour, resumes
	$(BIN)/python bench/goodput.py --peers $(PEERS)

twin-vs-real: $(INSTALLED) ## Compare the twin with the real server and replay its runs; 2.5 hours, an hour at a time
	$(BIN)/python bench/twin_vs_real.py --models $(PEERS)/models

fabric: $(INSTALLED) ## Measure how KV blocks travel, beside a plain copy of them; a quarter of an hour
	$(BIN)/python bench/fabric.py --json results/fabric.json

# Of `reproduce`: what takes less than two minutes each, the fits of experts and split points left out.
REPRODUCED ?= llmservingsim serving_points mooncake_hits
BRIEF_serving_points ?= --only-dense
reproduce: $(REPRODUCED:%=reproduce-%) ## Predict what others published: theirs, ours, the error; reproduce-NAME for one

reproduce-%: $(INSTALLED)
	$(BIN)/python bench/reproduce/$*.py $(BRIEF_$*) $(ARGS)

fuzz: $(INSTALLED) ## Throw MUTATIONS (100000) random changes of messages at both ends of tcp
	MUTATIONS=$(MUTATIONS) $(BIN)/pytest -q --timeout 3600 tests/property/test_wire_fuzz.py

docs: $(INSTALLED) ## Write the pages that are made from the code: configuration, metrics
	$(BIN)/python docs/generate.py

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
