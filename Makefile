# `make report` and `make test` do all of their own set-up in .venv; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
RUN := PATH="$(BIN):$$PATH"
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: report test thorough lint bench gpu clean help

help:
	@echo "make report   measure this machine and write report/index.html"
	@echo "make test     the tests that this machine can run; of references, interpreted and emulated kernels one case in seven"
	@echo "make thorough every case of these as well: hours on two cores"
	@echo "make lint     ruff, mypy, clang-format"
	@echo "make bench    pytest-benchmark, to compare two versions of the code"
	@echo "make gpu      on a machine with a GPU and no network: build, test, sanitize, measure"
	@echo "make clean    remove everything that was built"

$(VENV)/installed: requirements.txt constraints.txt
	@echo "== creating $(VENV) and installing the pinned packages (torch is large: this can take minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "== building the extension: C++ kernels, the CUDA kernels' emulation, and CUDA where nvcc is found"
	$(RUN) KX_EMULATION=on python -m pip install -v --no-build-isolation --no-deps -e . 
	@touch $@

report: $(VENV)/built
	$(RUN) python -m benchmarks report

test: $(VENV)/built
	$(RUN) python -m pytest -n auto --dist loadgroup

thorough: $(VENV)/built
	$(RUN) python -m pytest -n auto --dist loadgroup --thorough

lint: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/built
	$(RUN) python -m pytest benchmarks --benchmark-autosave

gpu:
	bash benchmarks/gpu.sh

clean:
	rm -rf $(VENV) build report kx_kernels/*.so *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
