# Daily commands. Everything installs into .venv; PYTHON and TORCH choose the interpreter and the torch to install.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
# Threads that wait by spinning starve each other on a busy machine.
export OMP_WAIT_POLICY ?= passive
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
BUILD_REQUIREMENTS := 'setuptools>=77' wheel 'ninja>=1.11'
CUTLASS := nvidia-cutlass==4.2.0.0

.PHONY: help install demo test emulator bench gpu gpu-bench gpu-tune resources format clean
help:
	@echo "make demo | test | emulator | bench | gpu | gpu-bench | gpu-tune | resources | format | clean"

$(VENV)/requirements-installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)" $(BUILD_REQUIREMENTS)
	$(PIP) install --quiet --no-deps $(CUTLASS)
	@missing="$$($(VENV)/bin/python tools/toolchain.py)"; [ -z "$$missing" ] || $(PIP) install --quiet $$missing
	touch $@

# Editable, so that Python edits take effect at once; a second install compiles only the kernels that changed.
install: $(VENV)/requirements-installed
	$(PIP) install --quiet --no-build-isolation -e .

demo: $(VENV)/requirements-installed
	$(PIP) install --quiet --no-build-isolation -e '.[demo]'
	$(VENV)/bin/python examples/train_language_model.py --out output/demo

# The emulator, and the extension's own objects linked against it: FLASH_EXT_EMULATE=sm90 .venv/bin/python ...
emulator: install
	$(VENV)/bin/python tests/emulator/build.py --out build/emulator --extension

EMULATED_SM89 = $(addprefix tests/emulated/,test_forward_fp8.py test_planted.py test_quantize.py)
test: $(VENV)/requirements-installed
	$(PIP) install --quiet --no-build-isolation -e '.[test]'
	$(VENV)/bin/python tests/emulator/build.py --out build/emulator --extension
	$(VENV)/bin/python tools/resources.py
	$(VENV)/bin/python tools/static_report.py --check
	@# Two cores: the emulated Hopper and Ada beside everything else; all report in full, and any fails it.
	@(FLASH_EXT_EMULATE=sm90 $(VENV)/bin/pytest tests/emulated; a=$$?; \
	  FLASH_EXT_EMULATE=sm89 $(VENV)/bin/pytest $(EMULATED_SM89); b=$$?; \
	  [ $$a -eq 0 ] && [ $$b -eq 0 ]) > build/emulated.log 2>&1 & emulated=$$!; \
	$(VENV)/bin/pytest; status=$$?; FLASH_EXT_EMULATE=sm80 $(VENV)/bin/pytest tests/emulated || status=1; \
	wait $$emulated || status=1; cat build/emulated.log; exit $$status

PRESET ?= quick
bench: $(VENV)/requirements-installed
	$(PIP) install --quiet --no-build-isolation -e '.[bench]'
	$(VENV)/bin/python benchmarks/run.py --preset $(PRESET) --json output/bench.json --plot output/bench.png

# On a machine with a GPU, python3, torch, nvcc and ninja; no network needed. FLASH_EXT_WHEELS: a folder with CUTLASS's wheel.
gpu:
	$(PYTHON) tools/gpu_session.py --out output/gpu --budget 530

# A full benchmark preset in parts that each fit ten minutes: make gpu-bench PRESET=paper PART=2/4
PART ?= 1/1
gpu-bench:
	$(PYTHON) tools/gpu_session.py --plan bench --out output/gpu-bench --budget 560 -- --preset $(PRESET) --part $(PART)

# Times candidate tiles of one shape family and prints the winners as rows for csrc/rows/fwd.py.
HEAD_DIM ?= 128
MASK ?= causal
gpu-tune:
	$(PYTHON) tools/gpu_session.py --plan tune --out output/gpu-tune --budget 570 -- --head-dim $(HEAD_DIM) --mask $(MASK)

resources:
	$(VENV)/bin/python tools/resources.py
	$(VENV)/bin/python tools/static_report.py

format:
	$(PIP) install --quiet ruff clang-format
	$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .
	git ls-files '*.h' '*.cpp' '*.cuh' '*.cu' | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf build output *.egg-info flash_ext/*.so
