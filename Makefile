# make demo: the main job.   make test: builds and passes every test.   make lint, make sanitize: what CI checks beside.
# All make a virtual environment in .venv where VENV names none, install torch where it has none, and build.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test build lint ctest sanitize clean

demo: build
	$(BIN)/python -m demo

test: build ctest
	# Two workers of one thread each; tests that want more threads ask for them.
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

build: $(VENV)/.ready
	$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/python tools/extras.py test bench lint | xargs $(BIN)/pip install -q 'setuptools<82' wheel
	touch $@

# The kernel layer and its C++ tests, without torch.
CMAKE_FLAGS ?=
ctest: $(VENV)/.ready
	$(BIN)/cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release $(CMAKE_FLAGS) >/dev/null
	$(BIN)/cmake --build build/cmake -j2 >/dev/null
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own. Python is not built with
# them, so their library is loaded before it.
SANITIZED_TESTS ?= tests/test_forward.py tests/test_backward.py
sanitize: $(VENV)/.ready
	ADASPLASH2_CUDA=0 ADASPLASH2_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base build/sanitize \
	  --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	  $(BIN)/pytest -n 2 $(SANITIZED_TESTS)

clean:
	rm -rf build adasplash2/*.so
