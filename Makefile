# `make demo` and `make test` are all that a fresh machine needs (Python 3.11 or newer, no GPU).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test fast chaos bench lint format docs dist install clean-demo

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# Raw data -> backbone -> corpus -> pretraining -> finetuning -> report, each step one command.
demo: install clean-demo
	$(BIN)/cllm4rec build-backbone shards/demo.yaml backbones/demo hidden_size=128 num_layers=1 vocab_size=2000
	$(BIN)/cllm4rec prepare shards/demo.yaml shards/demo/corpus --tokenizer backbones/demo
	$(BIN)/python launch/pretrain.py --config launch/configs/demo-pretrain.yaml --workers $(WORKERS)
	$(BIN)/python launch/finetune.py --config launch/configs/demo-finetune.yaml --workers $(WORKERS)
	$(BIN)/cllm4rec evaluate runs/demo/finetune --workers $(WORKERS)

clean-demo:
	rm -rf backbones/demo shards/demo runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site in build/site, which loads nothing from elsewhere. Warnings are errors.
docs: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# sdist and wheel in dist/; fails where the wheel lacks a file of the package.
dist: install
	rm -rf dist
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build
	.ci/check-wheel dist/*.whl

# Kills ranks of a run ten times, then goes on at 2, 3, 1 and 4 ranks, and shows that nothing is lost.
chaos: install
	$(BIN)/python -m tests.integration.chaos --kills 10
	$(BIN)/python -m tests.integration.chaos --worlds 2,3,1,4

# What things cost, as ratios within one run; about half an hour, on an idle machine. Figures go to benchmarks/results/.
BEAUTY := --corpus shards/amazon-beauty --backbone backbones/amazon-beauty
bench: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.head
	$(BIN)/python -m benchmarks.topk
	$(BIN)/python -m benchmarks.lookup
	$(BIN)/python -m benchmarks.zero3
	$(BIN)/python -m benchmarks.adam
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.sampled
	$(BIN)/python -m benchmarks.saving
	$(BIN)/python -m benchmarks.increments
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.prepare --against 209f533
	if [ -d backbones/amazon-beauty ]; then \
	    $(BIN)/python -m benchmarks.stream $(BEAUTY) --steps 8 --json benchmarks/results/stream-amazon-beauty.json; fi
	if [ -d backbones/amazon-beauty ]; then $(BIN)/python -m benchmarks.step $(BEAUTY); fi

PYTEST := $(BIN)/python -m pytest --no-loadscope-reorder

# Four files of tests at a time, those that start whole runs first (tests/conftest.py): while some wait for their ranks,
# others use the cores.
test: install lint
	$(PYTEST) --numprocesses 4

# What to run before each commit: under two minutes on two cores. Few tests wait, so a process a core is enough.
fast: install lint
	$(PYTEST) --numprocesses logical -m "not slow and not integration"
