# make demo and make test do all of the set-up that they need. TORCH chooses another build of torch, PYTHON the interpreter.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS := train,tensorboard,test,lint,build
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Where there is a compiler, an extension that does not build is an error.
export METAFAST_CPU ?= $(if $(shell command -v c++ || command -v g++ || command -v clang++),1)
SOURCES := pyproject.toml setup.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)
CPP := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: setup demo test lint bench gpu-check clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	$(BIN)/metafast demo

# One thread a worker: two workers with two threads each would wait for one another.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out benchmarks/results

clean:
	rm -rf $(VENV) build dist *.egg-info metafast/*.so
