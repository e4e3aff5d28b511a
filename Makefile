# make demo: everything from nothing to a trained, tested capsule network.   make test: the same for the tests.
PYTHON ?= python3
BIN := .venv/bin
# Changes when what has to be installed changes, so a second `make` installs nothing.
INSTALLED := .venv/installed-$(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)
INSTALLED_DOCS := .venv/installed-docs-$(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)
DEMO := outputs/demo
# pytest's options without those of jaxtyping, which checks the arguments of every call
UNCHECKED := --strict-markers --import-mode=importlib

.DEFAULT_GOAL := help
.PHONY: help install demo test test-avx2 soak lint format docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "capsexp needs Python 3.11 to 3.13, $(PYTHON) is another: make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	rm -f .venv/installed-*
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

install: $(INSTALLED) ## the environment in .venv

demo: $(INSTALLED) ## train a small CapsNet on embedded digits (under a minute), evaluate it, show where it is
	rm -rf $(DEMO)
	$(BIN)/capsexp train run=$(DEMO)
	$(BIN)/capsexp eval run=$(DEMO)
	@echo
	@echo "The run is in $(DEMO). Its curves and reconstructions:"
	@echo "  $(BIN)/tensorboard --logdir $(DEMO)    then open http://localhost:6006"

test: $(INSTALLED) ## all tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -q -n 2 -o addopts="$(UNCHECKED) -m compile" $$(grep -rl --include='*.py' mark.compile tests)

# The most that PyTorch's own loops, oneDNN, MKL and the kernels of capsexp may use.
test-avx2: export ATEN_CPU_CAPABILITY := avx2
test-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
test-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
test-avx2: export CAPSEXP_MARCH := x86-64-v3
# torch.compile's cache does not tell AVX-512 kernels from AVX2 ones; mixed, they crash.
test-avx2: export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/build/inductor-avx2
test-avx2: test ## all tests as on an x86 processor without AVX-512

soak: $(INSTALLED) ## the long tests of reliability: kills, bad values, many runs
	$(BIN)/python -m pytest -q -o addopts="$(UNCHECKED) -m soak" $$(grep -rl --include='*.py' mark.soak tests)

lint: $(INSTALLED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED_DOCS) ## the documentation site, into build/site
	$(BIN)/python docs/make_config_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site
	@echo
	@echo "The site is in build/site. To read it with its search:"
	@echo "  $(BIN)/python -m http.server --directory build/site    then open http://localhost:8000"

clean: ## remove the environment and caches; runs in outputs/ stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
