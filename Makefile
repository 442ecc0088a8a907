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
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh)

# What AddressSanitizer sees by itself needs no second check.
SANITIZE := -O1 -g1 -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow -fno-sanitize-recover=all
LIBASAN := $(wildcard $(shell g++ -print-file-name=libasan.so 2>/dev/null))
SANITIZED := build/sanitize/lib

.PHONY: setup demo test sanitize lint bench gpu-check gpu-pack clean

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
	$(if $(LIBASAN),$(MAKE) sanitize,@echo "g++ with AddressSanitizer is not here: make sanitize is left out")

# The native executor and the CUDA executor's twin on small cases, built with AddressSanitizer and UBSan.
sanitize: $(SANITIZED)/built
	$(BIN)/python setup.py --quiet build_py --build-lib $(SANITIZED)
	LD_PRELOAD="$(LIBASAN) $(shell g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	PYTHONPATH=$(SANITIZED) $(BIN)/pytest -m "not slow" --capture=sys \
	tests/test_native*.py tests/test_cuda_twin.py -k "test_native or (test_float32 and global)"

$(SANITIZED)/built: $(STAMP)
	rm -rf build/sanitize
	METAFAST_CPU=1 METAFAST_CUDA=0 METAFAST_ISAS=$(if $(filter x86_64,$(shell uname -m)),avx2) METAFAST_CXXFLAGS="$(SANITIZE)" \
	$(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out benchmarks/results

# Prepares here what would cost time there: make gpu-pack OMNIGLOT=DIR, the folder of Omniglot's two zips.
gpu-pack: $(DEVICE_VENV)/installed
	$(DEVICE_VENV)/bin/python benchmarks/gpu/pack.py --extension $(DEVICE_LIB)/metafast/_C.abi3.so --omniglot "$(OMNIGLOT)"

clean:
	rm -rf $(VENV) build dist *.egg-info metafast/*.so
