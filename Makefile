# One file, no tools besides make and Python 3.11, 3.12 or 3.13. `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest
# Not for tests that start Ray: those want all cores.
SIDE_BY_SIDE := -n auto --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help serve test check fmt manifests dashboards bench bench-peers soak image clean lock

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/serve.stamp ## Install, fetch the default base model, and serve on 127.0.0.1:8000 until Ctrl-C
	@exec $(BIN)/slipstream serve

test: $(VENV)/dev.stamp $(VENV)/kube-tools.stamp ## All tests that need no GPU: unit, contract, integration, end to end
	$(PYTEST) $(SIDE_BY_SIDE) -m "not ray and not gpu and not soak" tests/unit tests/k8s tests/contract tests/integration $(ARGS); \
	  first=$$?; [ $$first = 0 ] || [ $$first = 5 ] || exit $$first; \
	  $(PYTEST) -m "ray and not gpu and not soak" tests/k8s tests/integration tests/e2e $(ARGS); second=$$?; \
	  [ $$second = 5 ] && exit $$first || exit $$second # 5: ARGS chose none of these

check: $(VENV)/dev.stamp ## Formatting, lint, types and unit tests: under 90 seconds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) $(SIDE_BY_SIDE) -q tests/unit $(ARGS)

fmt: $(VENV)/dev.stamp ## Format, and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

manifests: $(VENV)/kube-tools.stamp ## Write anew what is generated under k8s/, and the tests' snapshots of it
	PYTHONPATH=platform:.:tests $(BIN)/python -m tests.support.manifests

bench: $(VENV)/dev.stamp ## Measure; ARGS=engine (default), sweep, steps, adapters, prompts, quantized, gpu, http, replay, ranks, registry, backups, routing, routing-cost, scaling, lossless, drafts, training, streams or gates, with their options
	$(BIN)/python -m benchmarks $(or $(ARGS),engine)

bench-peers: $(VENV)/dev.stamp ## Set up what we are measured beside (vLLM's CPU build, about 3 GB, and llama.cpp, compiled) under .peers
	$(BIN)/python -m benchmarks.peers.install

soak: $(VENV)/dev.stamp ## The full-size runs that are too long for make test
	SLIPSTREAM_FUZZ_EXAMPLES=20000 $(PYTEST) tests/unit/engine/test_scheduler.py --timeout 3600 $(ARGS)
	SLIPSTREAM_ISOLATION_REQUESTS=50000 $(PYTEST) tests/integration/test_isolation.py --timeout 7200 $(ARGS)
	$(PYTEST) -s -m soak tests/soak $(ARGS)

image: ## Build the container image; TARGET=cpu (default) or cuda, ARGS=--build-arg … (docs/operations/image.md)
	docker build --target $(or $(TARGET),cpu) --tag slipstream:$(or $(TARGET),cpu) \
	  --build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
	  --build-arg REVISION="$$(git rev-parse HEAD)" $(ARGS) .

clean: ## Remove the virtual environment and all caches; your data folder stays
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

dashboards: $(VENV)/dev.stamp ## Write the Grafana dashboards of k8s/monitoring from tests/support/boards.py
	PYTHONPATH=tests $(BIN)/python -m support.dashboards

lock: $(VENV)/dev.stamp ## Write constraints.txt from what is installed in .venv
	$(BIN)/python -m tests.support.lock > constraints.tmp && mv constraints.tmp constraints.txt

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "Slipstream needs Python 3.11, 3.12 or 3.13; %s is %d.%d. Name another: make PYTHON=python3.12 …" % (sys.executable, *v))'
	@echo "Making $(VENV) …"
	@$(PYTHON) -m venv $(VENV)

# torch alone and first: it is by far the largest, and a failed download is then plain to see.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	@echo "Installing torch (a few minutes the first time) …"
	@$(PIP) install --progress-bar on -c constraints.txt "torch==2.13.*"
	@touch $@

$(VENV)/serve.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	@echo "Installing Slipstream …"
	@$(PIP) install --progress-bar on -c constraints.txt -e .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	@echo "Installing Slipstream with what its tests need …"
	@$(PIP) install --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/serve.stamp

# kubectl, helm and checkov, each in one version, under .slipstream/tools.
$(VENV)/kube-tools.stamp: tests/support/kube_tools.py $(VENV)/dev.stamp
	@echo "Fetching kubectl, helm and checkov …"
	@PYTHONPATH=tests $(BIN)/python -m tests.support.kube_tools
	@touch $@
