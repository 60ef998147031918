# Every target builds .venv itself; `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RECIPE ?= recipes/demo/recipe.yaml
OUT ?= runs/demo

.PHONY: demo test check bench gpu gpu-wheels clean help

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

check: $(STAMP)  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## every benchmark, each against a peer or a ceiling measured in the same run
	@for name in engine train ppo server quantize formats; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

gpu:  ## tests and benchmarks of a CUDA device with PYTHON's own PyTorch, and docs/gpu.md; nothing without a device
	@$(PYTHON) benchmarks/gpu.py $(if $(PAGE),--page '$(PAGE)') $(if $(WHEELS),--wheels '$(WHEELS)') $(if $(TINY),--tiny)

gpu-wheels:  ## what `make gpu` may miss on a machine without network, into WHEELS (wheels/), for GPU_PYTHON (3.12)
	@$(PYTHON) -m pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp \
	  --python-version $(or $(GPU_PYTHON),3.12) $(foreach tag,manylinux_2_28 manylinux_2_17 manylinux2014,--platform $(tag)_x86_64) \
	  -c constraints.txt -d $(or $(WHEELS),wheels) pydantic tyro rich pyyaml sentencepiece safetensors pytest pytest-timeout

clean:  ## remove the environment and caches, never runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
