# make demo and make test do all of the set-up that they need. TORCH chooses another build of torch, PYTHON another interpreter.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS := train,tensorboard,test,lint,build
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Where there is a C++ compiler, it is an error if the extension does not build.
export METAFAST_CPU ?= $(if $(shell command -v c++ || command -v g++ || command -v clang++),1)
SOURCES := pyproject.toml setup.py $(filter-out %.md,$(wildcard csrc/* csrc/*/* csrc/*/*/*))
CPP := $(foreach kind,h cpp cu cuh,$(wildcard csrc/*/*.$(kind) csrc/*/*/*.$(kind))) $(wildcard tests/*.cpp)

# csrc must compile against the headers of these versions of torch too: the oldest that is supported, and a GPU machine's.
OLDER := 2.10.0 2.11.0
OLDER_HEADERS := $(OLDER:%=build/headers/%)
TARGET = $(shell sed -n 's/.*"TORCH_TARGET_VERSION", "\(\w*\)".*/-DTORCH_TARGET_VERSION=\1/p' setup.py)
# A GPU machine may have these versions in the place of CI's; the interpreter of this Triton needs an older NumPy.
DEVICE := torch==2.11.0 triton==3.6.0 "numpy<2.4"
DEVICE_VENV := .venv-device
DEVICE_LIB := build/device/lib
X86 := $(filter x86_64,$(shell uname -m))

# UBSan leaves out what AddressSanitizer finds by itself.
SANITIZE := -O1 -g1 -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow -fno-sanitize-recover=all
LIBASAN := $(wildcard $(shell g++ -print-file-name=libasan.so 2>/dev/null))
SANITIZED := build/sanitize/lib

.PHONY: setup demo test test-device-versions sanitize fuzz lint bench gpu-check gpu-pack clean

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

# One thread a worker: two workers with two threads each would wait for one another. Then what threads concern, with two.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --ignore tests/test_threads.py
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/test_threads.py tests/test_meta_gradients.py \
	-k "threads or (auto and float32)"
	$(if $(LIBASAN),$(MAKE) sanitize,@echo "g++ with AddressSanitizer is not here: make sanitize is left out")

# Runs the CPU executor and the CUDA executor's twin on small cases, built with AddressSanitizer and UBSan.
sanitize: $(SANITIZED)/built
	$(BIN)/python setup.py --quiet build_py --build-lib $(SANITIZED)
	LD_PRELOAD="$(LIBASAN) $(shell g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	PYTHONPATH=$(SANITIZED) $(BIN)/pytest -m "not slow" --capture=sys \
	tests/test_native*.py tests/test_cuda_twin.py -k "test_native or (test_float32 and global)"

$(SANITIZED)/built: $(STAMP)
	rm -rf build/sanitize
	METAFAST_CPU=1 METAFAST_CUDA=0 METAFAST_ISAS=$(if $(X86),avx2) METAFAST_CXXFLAGS="$(SANITIZE)" \
	$(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	touch $@

# An environment with the versions of a GPU machine. The extension for an H100 is built beside it, in $(DEVICE_LIB): the
# folder metafast/ holds the one of $(VENV).
$(DEVICE_VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv --clear $(DEVICE_VENV)
	$(DEVICE_VENV)/bin/python -m pip install --quiet --no-compile $(DEVICE)
	$(DEVICE_VENV)/bin/python -m pip install --quiet --no-compile "setuptools>=77" wheel ninja
	METAFAST_CPU=0 $(DEVICE_VENV)/bin/python -m pip install --quiet --no-compile --no-build-isolation -e ".[train,test]"
	rm -rf build/device
	METAFAST_CPU=1 METAFAST_CUDA=1 METAFAST_ISAS=$(if $(X86),avx2) METAFAST_ARCHS=90 \
	$(DEVICE_VENV)/bin/python setup.py --quiet build --build-base build/device --build-lib $(DEVICE_LIB)
	touch $@

# Runs the CPU-side tests of the CUDA and Triton code with the versions of a GPU machine. It belongs to each release, and to
# each change of csrc/, kernels/ or benchmarks/gpu/. It takes more than four minutes of two cores, so .ci/run leaves it out.
# Other versions may warn, so warnings are no errors here.
test-device-versions: $(DEVICE_VENV)/installed
	$(DEVICE_VENV)/bin/python setup.py --quiet build_py --build-lib $(DEVICE_LIB)
	METAFAST_CUDA=1 OMP_NUM_THREADS=1 PYTHONPATH=$(DEVICE_LIB) $(DEVICE_VENV)/bin/pytest -n 2 -W default \
	tests/test_build.py tests/test_cuda_twin.py tests/test_cuda_precision.py tests/test_triton*.py tests/test_outer.py \
	tests/test_sampler.py

# A Mac's wheel is the smallest of a version, and the headers that csrc includes are the same in all of them.
build/headers/%/unpacked: $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 311 --platform macosx_11_0_arm64 \
	--dest $(@D) torch==$*
	$(BIN)/python -c "import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
	wheel.extractall('$(@D)', [n for n in wheel.namelist() if n.startswith('torch/include/')])" $(@D)/*.whl
	rm $(@D)/*.whl
	touch $@

build/headers/checked: $(OLDER_HEADERS:%=%/unpacked) $(SOURCES)
	for headers in $(OLDER_HEADERS); do for cuda in -UMETAFAST_CUDA -DMETAFAST_CUDA; do \
	  $(CXX) -fsyntax-only -std=c++20 $(TARGET) -DPy_LIMITED_API=0x030a0000 -DMETAFAST_FLAGS='""' $$cuda \
	  -I$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('include'))") -I$$headers/torch/include \
	  csrc/torch/*.cpp || exit 1; \
	done; done
	touch $@

# Holds random programs against the oracle, for the night: make fuzz COUNT=10000 SEED=0. make test runs the first 300.
COUNT ?= 10000
SEED ?= 0
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count $(COUNT) --seed $(SEED)

lint: setup $(if $(METAFAST_CPU),build/headers/checked)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Runs on a machine with a GPU. benchmarks/gpu/plans.py says what it does; it needs neither make nor this environment.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --plan first --out build/gpu-check

# Prepares what would cost time on the GPU machine: make gpu-pack OMNIGLOT=DIR, the folder of Omniglot's two zips.
gpu-pack: $(DEVICE_VENV)/installed
	$(DEVICE_VENV)/bin/python -m benchmarks.gpu.pack --extension $(DEVICE_LIB)/metafast/_C.abi3.so --omniglot "$(OMNIGLOT)"

clean:
	rm -rf $(VENV) $(DEVICE_VENV) build dist *.egg-info metafast/*.so
