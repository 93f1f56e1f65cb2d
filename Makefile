# Every target sets up .venv on first use and does nothing where that is done. More options: make pretrain ARGS="--data photos/"
.DEFAULT_GOAL := help
.PHONY: help setup pretrain test test-slow test-gpu chaos bench lint clean
PYTHON_HERE := .venv/bin/python
ARGS ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/ready ## system packages for FFCV, .venv, the project
.venv/ready: pyproject.toml constraints.txt .ci/setup
	@.ci/setup

pretrain: .venv/ready ## pretrain and evaluate on the embedded images, minutes on 2 CPU cores
	$(PYTHON_HERE) -m pipeline.pretrain --backbone vit_s16 $(ARGS)

test: .venv/ready ## every test that is neither slow nor needs a GPU
	OMP_NUM_THREADS=1 $(PYTHON_HERE) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/ready ## the tests that take minutes
	$(PYTHON_HERE) -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: .venv/ready ## the tests that need CUDA
	$(PYTHON_HERE) -m pytest -m gpu $(ARGS)

chaos: .venv/ready ## do every fault to a real run, and say what it cost
	$(PYTHON_HERE) -m tests.chaos $(ARGS)

bench: .venv/ready ## measure loading and training against the alternatives and write README's tables
	$(PYTHON_HERE) -m pipeline.bench loader --write README.md $(ARGS)
	$(PYTHON_HERE) -m pipeline.bench start --write README.md
	$(PYTHON_HERE) -m pipeline.bench step --write README.md
	$(PYTHON_HERE) -m pipeline.bench engine --write README.md
	$(PYTHON_HERE) -m pipeline.bench watcher --rounds 80 --write README.md

lint: .venv/ready ## ruff and mypy
	$(PYTHON_HERE) -m ruff check .
	$(PYTHON_HERE) -m mypy

clean: ## remove .venv and what tools left; runs and packed images stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
