# make train: the main job from a fresh clone.   make test: lint, types and every test.   make help: the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
TORCH  ?=
# TORCH=cpu: builds of torch and torchvision without CUDA; a local version such as 2.15.0+cpu counts as newer than 2.15.0
INDEX  := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

.PHONY: help install schemas rename train test test-long test-slurm faults mutants docs lint format bench compare compare-pretraining clean clean-cache

help:
	@echo "make train [ARGS='data.source=sample ...']   install if need be and run the linear probe"
	@echo "make test                                    install the test extras, then lint, types and all tests but the next two"
	@echo "make test-long                               run the longest tests, every command of the pages, and the notebooks"
	@echo "make test-slurm                              sweeps, several tasks and preemption on a SLURM of this machine (Debian, root)"
	@echo "make faults                                  kill runs, fill disks, mutate files, flood the server: 30 minutes, then a table"
	@echo "make mutants                                 change the code at random: would the tests notice? 30 minutes"
	@echo "make docs                                    build the pages as a site, in site/"
	@echo "make bench                                   measure speed beside the strongest other way (20 minutes)"
	@echo "make compare                                 all policies and baselines on the official test digits (hours)"
	@echo "make compare-pretraining                     all pretraining objectives at equal compute (hours)"
	@echo "make schemas                                 JSON schemas of configs/, by which editors complete the YAML"
	@echo "make clean-cache                             remove the cached features in logs/cache"
	@echo "make rename NAME=myproject                   give the package another name, everywhere"
	@echo "make lint | format | clean"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "thaw needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing into $(VENV): torch and what it needs take some minutes and about 6 GB, once (less without CUDA: TORCH=cpu)."
	$(BIN)/python -m pip install -c constraints.txt $(INDEX) -e .
	@touch $@
	-@$(BIN)/python -m tools.schemas

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

install: $(VENV)/.installed

schemas: $(VENV)/.installed
	$(BIN)/python -m tools.schemas

train: $(VENV)/.installed
	$(BIN)/python train.py experiment=vit_linear_probe $(ARGS)

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "The site is in site/: open site/index.html"

rename: $(VENV)/.installed-test
	@$(BIN)/python tools/rename.py "$(NAME)"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 1 -m "not slurm and not long" $(ARGS)

test-long: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o faulthandler_timeout=0 -m long --ignore=tests/faults $(ARGS)

faults: $(VENV)/.installed-test
	THAW_FAULTS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -n 2 --dist loadfile --no-loadscope-reorder \
	  -o timeout=1500 -o faulthandler_timeout=0 -m "" $(ARGS)

test-slurm: $(VENV)/.installed-test
	command -v slurmctld munged >/dev/null || { apt-get update && apt-get install -y slurm-wlm munge; }
	$(BIN)/python -m pytest tests/slurm $(ARGS)

mutants: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[mutants]'
	$(BIN)/python -m tools.mutants $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bench $(ARGS)

compare: $(VENV)/.installed
	$(BIN)/python -m benchmarks.compare $(ARGS)

compare-pretraining: $(VENV)/.installed
	$(BIN)/python -m benchmarks.compare_pretraining $(ARGS)

clean-cache:
	rm -rf logs/cache

clean:
	rm -rf $(VENV) build site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
