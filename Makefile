# Every target but `gpu` does its own set-up: a virtual environment in .venv, the pinned packages, the C++ extension.
#   make demo    train a small NVAE on real images for about two minutes, leave pictures in runs/demo/
#   make test    the whole test suite, no GPU needed
#   make build   environment and extension only
#   make bench   benchmarks of this machine -> benchmarks/results/
#   make lint    ruff, clang-format, mypy
#   make gpu     with the python at hand (no network, no .venv): build in place, test on the GPU, benchmark it

PYTHON ?= python3
# The PyTorch that the suite is pinned to. Any requirement pip understands: make test TORCH='torch==2.11.0'
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
# Test processes; two cores run the suite in half the time.
JOBS ?= 2

.PHONY: all build test demo bench lint gpu clean

all: build

$(VENV)/.installed: pyproject.toml Makefile
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and the tools into $(VENV)"
	@$(PY) -m pip install -q --disable-pip-version-check "$(TORCH)" numpy setuptools wheel ninja packaging
	@$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[data,plot,triton,dev]"
	@touch $@

build: $(VENV)/.installed
	@$(PY) setup.py -q build_ext --inplace
	@$(PY) -m nvae_fast info

test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)

demo: build
	$(PY) -m nvae_fast train --preset digits_demo --data digits --out runs/demo --overwrite
	$(PY) -m nvae_fast evaluate runs/demo --threads 1 --json runs/demo/evaluation.json
	@echo "look at runs/demo/samples.png and runs/demo/reconstructions.png"

bench: build
	$(PY) -m benchmarks --json benchmarks/results/$$($(PY) -m benchmarks --machine-name).json --plot benchmarks/results

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(VENV)/bin/mypy
	$(PY) -m benchmarks.report --readme --check

gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m nvae_fast info
	$(PYTHON) -m pytest -q -x
	$(PYTHON) -m benchmarks --device cuda --json benchmarks/results/$$($(PYTHON) -m benchmarks --machine-name --device cuda).json

clean:
	rm -rf build dist *.egg-info nvae_fast/_C*.so nvae_fast/_build.json .pytest_cache .mypy_cache .ruff_cache

# Builds and tests for every supported Python and PyTorch (python3.10 to python3.13 on PATH); the table is docs/support.md.
matrix:
	$(PYTHON) tests/matrix.py
.PHONY: matrix
