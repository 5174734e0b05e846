# make demo: prune a CNN on real data. make test: every test but the slow ones. Both make .venv first if it is missing.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV := .venv
BIN := $(VENV)/bin
WHEEL := build/wheel/taylored-*.whl
# .pre-commit-config.yaml has the same versions.
LINT := ruff==0.17.6 clang-format==23.1.5
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.py')
PYTEST := -m pytest -q -n 2
# The oldest torch; what the tests of the core need; the core.
FLOOR := torch==2.10.0 torchvision==0.25.0
TEST_TOOLS := numpy scipy safetensors tqdm pytest pytest-xdist hypothesis expecttest
CORE := $(patsubst %,tests/test_%.py,ops values trace rules shapes plan compact restore score checkpoint oracle criteria)
# Threads that wait shall sleep: spinning, they stall each other wherever the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all floor sanitize bench docs static lint abi clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/taylored prune --data digits --model small_vgg --weights none --target-flops 0.5 --out runs/demo

test test-all: export CMAKE_ARGS = -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
test: $(VENV)/test-tools
	$(BIN)/python $(PYTEST)

test-all: $(VENV)/test-tools
	$(BIN)/python $(PYTEST) -m ''

# The core under the oldest torch, with the wheel built against $(TORCH): the stable ABI keeps its promise.
floor: build/wheel/made
	$(PYTHON) -m venv build/floor
	build/floor/bin/pip install -q $(FLOOR) $(TEST_TOOLS)
	build/floor/bin/pip install -q --no-deps --force-reinstall $(WHEEL)
	build/floor/bin/python $(PYTEST) $(CORE)

# Address and undefined-behaviour sanitizers over the CPU operators. The simulated CUDA kernels are always under the second;
# for addresses, their own checker knows more.
sanitize: $(VENV)/test-tools
	CMAKE_ARGS='-DTAYLORED_CUDA_OFF=sanitized -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1"' \
		$(BIN)/pip install -q --no-build-isolation --no-deps --upgrade --target build/sanitized .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitized $(BIN)/python -m pytest -q tests/test_ops.py
	$(BIN)/python $(PYTEST) tests/test_simt.py tests/test_cuda_kernels.py

bench: $(VENV)/installed
	for name in contribution compact_op training_step trace programs cuda_kernels; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# The site, in build/docs: any warning is an error.
docs: $(VENV)/installed
	$(BIN)/pip install -q "$$(echo $(WHEEL))[docs]"
	$(BIN)/sphinx-build -q -W -b html docs build/docs

# What the CUDA library's machine code says; no GPU needed.
static: $(VENV)/installed
	$(BIN)/pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python benchmarks/cuda_static.py

lint: $(VENV)/lint-tools $(VENV)/test-tools
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

# The stable ABI: the wheel's libraries use no more of Python than they say, and run under another torch.
abi: build/wheel/made
	$(PYTHON) -m venv build/other-torch
	build/other-torch/bin/pip install -q torch==2.13.0 $(TEST_TOOLS) abi3audit
	build/other-torch/bin/abi3audit --strict --report $(WHEEL)
	build/other-torch/bin/pip install -q --no-deps --force-reinstall $(WHEEL)
	build/other-torch/bin/python -m pytest -q tests/test_ops.py

clean:
	rm -rf $(VENV) build dist runs python/*.egg-info python/taylored/lib

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed; name it: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/torch: $(VENV)/python
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q cmake ninja setuptools wheel numpy
	touch $@

# Built once, for whatever installs it.
build/wheel/made: $(VENV)/torch $(SOURCES)
	rm -rf build/wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	touch $@

# Tests and demo run what is installed, as a user would.
$(VENV)/installed: build/wheel/made
	$(BIN)/pip install -q --no-deps --force-reinstall $(WHEEL)
	$(BIN)/pip install -q "$$(echo $(WHEEL))[cli]"
	touch $@

$(VENV)/test-tools: $(VENV)/installed
	$(BIN)/pip install -q "$$(echo $(WHEEL))[dev]"
	touch $@

$(VENV)/lint-tools: $(VENV)/python
	$(BIN)/pip install -q $(LINT)
	touch $@
