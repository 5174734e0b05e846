# make demo: prune a CNN on real data. make test: every test. Both make .venv first if it is missing.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.py')
# Threads that wait shall sleep: spinning, they stall each other wherever the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test sanitize bench static lint abi clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/taylored prune --data digits --model small_vgg --weights none --target-flops 0.5 --out runs/demo

test: export CMAKE_ARGS = -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
test: $(VENV)/installed $(VENV)/test-tools
	$(BIN)/python -m pytest -q

# Address and undefined-behaviour sanitizers over the CPU operators. The simulated CUDA kernels are always under the second;
# for addresses, their own checker knows more.
sanitize: $(VENV)/installed $(VENV)/test-tools
	CMAKE_ARGS='-DTAYLORED_CUDA_OFF=sanitized -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1"' \
		$(BIN)/pip install -q --no-build-isolation --no-deps --upgrade --target build/sanitized .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitized $(BIN)/python -m pytest -q tests/test_ops.py
	$(BIN)/python -m pytest -q tests/test_simt.py tests/test_cuda_kernels.py

bench: $(VENV)/installed
	for name in contribution compact_op training_step trace cuda_kernels; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# What the CUDA library's machine code says; no GPU needed.
static: $(VENV)/installed
	$(BIN)/pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python benchmarks/cuda_static.py

lint: $(VENV)/test-tools
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

# The stable ABI: one wheel, built against $(TORCH), under another torch.
abi: $(VENV)/torch
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	$(PYTHON) -m venv build/other-torch
	build/other-torch/bin/pip install -q torch==2.13.0 numpy scipy safetensors tqdm pytest hypothesis expecttest
	build/other-torch/bin/pip install -q --no-deps --force-reinstall dist/taylored-*.whl
	build/other-torch/bin/python -m pytest -q tests/test_ops.py

clean:
	rm -rf $(VENV) build dist runs python/*.egg-info python/taylored/lib

$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed; name it: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q cmake ninja setuptools wheel pybind11 numpy
	touch $@

# Tests and demo run what is installed, as a user would.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation '.[cli]'
	touch $@

$(VENV)/test-tools: $(VENV)/torch
	$(BIN)/pip install -q pytest hypothesis expecttest onnx onnxruntime onnxscript ruff clang-format
	touch $@
