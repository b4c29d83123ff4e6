PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo model test faults nodes long lint format docs wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-8s %s\n", $$1, $$2}' Makefile

demo: model ## answer a question about a generated document on 4 CPU ranks
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 4 -m apb.run +model=smollm2-135m device=cpu

model: $(READY) ## fetch the demo model, 270 MB on disk
	$(BIN)/python -m apb.fetch smollm2-135m

test: model ## run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

faults: $(READY) ## kill, hang and spoil ranks in every stage, 5 minutes
	$(BIN)/python -m pytest tests/faults -m "faults or not faults"

long: model ## run the tests that take too long for every day
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

nodes: model ## test several machines, each a network namespace of this one (Linux, root)
	$(BIN)/python -m pytest -m nodes tests/nodes

lint: $(READY) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## fix style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY) ## build the documents as a site in build/docs
	$(BIN)/python -m sphinx -qW --keep-going -c docs . build/docs

wheel: $(READY) ## build dist/*.whl
	$(BIN)/hatchling build -t wheel

clean: ## remove everything that make created here
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c .ci/constraints.txt -e ".[demo,docs,test]"
	@touch $@
