# `make train` and `make test` run the setup if needed. `make help` lists all targets.
SHELL := bash
VENV ?= .venv
BIN := $(VENV)/bin
NPROC ?= 2
# Size of the corpus of `make data`
MEGABYTES ?= 32
# Additional keys for `make train`: make train KEYS="train.steps=20 log.wandb=disabled"
KEYS ?=
# Divide the cores evenly; torchrun's default is one thread per process
export OMP_NUM_THREADS ?= $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(NPROC) )); echo $$(( n > 0 ? n : 1 )))
SCRIPTS = $(wildcard launch/*.sh launch/slurm/*.sh docker/*.sh) launch/slurm/train.sbatch .ci/run
TORCHRUN = $(BIN)/torchrun --standalone --nproc-per-node $(NPROC)
RUN = $(TORCHRUN) launch/train.py

.DEFAULT_GOAL := help
.PHONY: help setup data train evaluate test test-all test-cluster test-serving lint proof figures image image-cpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## create .venv with all packages

$(VENV)/.ready: pyproject.toml constraints.txt launch/setup.sh
	@bash launch/setup.sh $(VENV)

data: setup ## build the default corpus: the sources of the installed Python packages
	@$(BIN)/python launch/prepare_data.py --output data/python --python-packages --max-megabytes $(MEGABYTES) \
	  --train-tokenizer 2048 --if-missing

train: data ## train a small model with fast weights on long documents, on two context-parallel ranks
	@$(RUN) recipe=tiny_ttt $(KEYS)

evaluate: setup ## evaluate `make train` with and without fast weights: loss by position, needle in a haystack
	@test -d runs/tiny_ttt/checkpoints || $(MAKE) train
	@$(TORCHRUN) launch/evaluate.py position runs/tiny_ttt --fast-weights on,off --samples 16 --length 4k --min-length 1k
	@$(TORCHRUN) launch/evaluate.py needle runs/tiny_ttt --fast-weights on,off --samples 4 --lengths 1k,2k,4k

test: setup ## run the tests, except those marked slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile

test-all: test ## run all tests, including those marked slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --numprocesses logical --maxprocesses 4 --dist loadfile

test-cluster: setup ## run the tests with Slurm and Docker, which it starts (needs root and the packages that .ci/run installs)
	@$(BIN)/python -m pytest -q tests/cluster

test-serving: setup ## run the tests of the vLLM plugin, with vLLM's CPU build in an environment of its own
	@bash launch/setup_vllm.sh || echo "the tests in tests/serving are skipped"
	@$(BIN)/python -m pytest -q tests/serving

lint: setup ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck --external-sources $(SCRIPTS)
	@$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

proof: setup ## show that fast weights store information from beyond the attention window
	@$(BIN)/python launch/proof.py

figures: setup ## write the numbers of src/inplace_ttt/figures.json into docs/numbers.md
	@$(BIN)/python -m inplace_ttt.figures

# Variables that are passed to the build if they are set
BUILD_ARGS = $(foreach name,BASE_IMAGE PACKAGES_IMAGE PIP_EXTRA_INDEX_URL,$(if $($(name)),--build-arg $(name)))
DOCKER ?= docker
BUILD = DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD_ARGS) $(BUILD_OPTIONS)

image: ## build the GPU image, inplace-ttt:gpu (docker/Dockerfile)
	@$(BUILD) --tag inplace-ttt:gpu --file docker/Dockerfile .

image-cpu: ## build the CPU image, inplace-ttt:cpu (docker/Dockerfile.cpu)
	@$(BUILD) --tag inplace-ttt:cpu --file docker/Dockerfile.cpu .

clean: ## remove runs and data, keep .venv
	rm -rf runs data
