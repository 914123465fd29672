# The only list of commands. `make help` prints it.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where the torch wheel comes from; empty: pip's own configuration. On Linux the default index holds the CUDA build.
LEMIX_TORCH_INDEX_URL ?=
PIP_INDEX := $(if $(LEMIX_TORCH_INDEX_URL),--extra-index-url $(LEMIX_TORCH_INDEX_URL),)
REPEAT ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo paper colocation convergence fidelity simulate up test nightly check fmt lint types imports protos protos-lint protos-check bench compose-config clean

help:  ## Show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## Create .venv with everything pinned (every other target does it by itself)
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip install -q 'pip==26.3'
	@$(BIN)/python -m pip install -q $(PIP_INDEX) -c constraints.txt 'torch==2.13.0'
	@$(BIN)/python -m pip install -q $(PIP_INDEX) -c constraints.txt --group dev -e .
	@touch $@

demo: install  ## Serve and train at once, four policies (about 5 minutes; REPEAT=3: spreads)
	@$(BIN)/python -m bench.demo --repeat $(REPEAT) $(DEMO_ARGS)

paper: install  ## Check the paper's claims in the simulator (minutes; FULL=1: everything)
	@$(BIN)/python -m bench.paper $(if $(FULL),--full) $(PAPER_ARGS)

colocation: install  ## Measure how much training fits beside serving on emulated GPUs (FULL=1: everything)
	@$(BIN)/python -m bench.colocation $(if $(FULL),--full) $(COLOCATION_ARGS)

convergence: install  ## Train replicas under every synchronisation policy (about 15 minutes)
	@$(BIN)/python -m bench.convergence $(CONVERGENCE_ARGS)

fidelity: install  ## Predictions against reality, the simulator against live clusters (about 10 minutes)
	@$(BIN)/python -m bench.fidelity --repeat $(REPEAT) $(FIDELITY_ARGS)

simulate: install  ## Plan a cluster: SIMULATE_ARGS="simulate|plan ..." (docs/operations.md)
	@$(BIN)/python -m services.simulator $(or $(SIMULATE_ARGS),--help)

up: install  ## Run the local cluster in the foreground (Ctrl-C stops it)
	@$(BIN)/python -m deploy.local $(UP_ARGS)

test: install  ## Run the tests (about 10 minutes)
	@$(BIN)/python -m pytest -q -m "not slow" $(TEST_ARGS)

nightly: install  ## Run everything, slow tests too
	@$(BIN)/python -m pytest -q $(TEST_ARGS)

check: lint types imports protos-lint protos-check compose-config  ## Run every static check

fmt: install  ## Format the code
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

lint: install
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .

types: install
	@$(BIN)/mypy

imports: install
	@PYTHONPATH=.:sdk $(BIN)/lint-imports --no-cache >/dev/null || PYTHONPATH=.:sdk $(BIN)/lint-imports --no-cache

protos: install  ## Generate the protobuf stubs again
	@deploy/generate_protos.sh $(BIN)/python sdk

protos-lint: install
	@$(BIN)/buf lint

protos-check: install
	@tmp=$$(mktemp -d) && deploy/generate_protos.sh $(BIN)/python $$tmp && \
	  for d in v1 internal/v1; do diff -r -x __init__.py -x __pycache__ $$tmp/lemix/$$d sdk/lemix/$$d || { echo "stubs are stale: run make protos"; rm -rf $$tmp; exit 1; }; done; rm -rf $$tmp

compose-config: install
	@$(BIN)/python -m deploy.compose_check deploy/docker-compose.yml
	@if command -v docker-compose >/dev/null; then docker-compose -f deploy/docker-compose.yml config -q; \
	  elif docker compose version >/dev/null 2>&1; then docker compose -f deploy/docker-compose.yml config -q; \
	  else echo "no compose binary here: the compose file was checked by deploy/compose_check.py only"; fi

bench: install  ## Run the benchmarks behind the published figures
	@$(BIN)/python -m bench.decision
	@$(BIN)/python -m bench.engine
	@$(BIN)/python -m bench.simulator
	@$(BIN)/python -m bench.exchange
	@$(BIN)/python -m bench.control

clean:  ## Remove what the commands made
	@rm -rf out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
