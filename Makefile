# Two commands for a fresh clone with Python >= 3.10, pip, venv and make:
#   make generate   writes sample.mp4 and sample.png from a prompt
#   make test       runs the CPU test suite
# CI also compiles the kernels with the oldest Triton that is supported (make compile).

PYTHON ?= python3
PROMPT ?= red heart moving left, green tree moving up on a navy background
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The suite compiles the kernels with the Triton that is installed, which is the newest.
OLDEST_TRITON := 3.6.0
TRITON_DIR := $(VENV)/triton-$(OLDEST_TRITON)
COMPILE_TESTS := $(addprefix tests/block_sparse/,impl/test_hopper_compile.py test_triton.py test_video_kernels.py) tests/distributed/test_merge.py tests/distributed/test_row_kernels.py tests/platforms/test_triton_launch.py

.PHONY: generate test compile lint check bench clean

generate: $(VENV)/.generate
	$(BIN)/fastvideo generate --prompt "$(PROMPT)" --out sample.mp4

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

compile: $(TRITON_DIR)/.complete
	PYTHONPATH=$(TRITON_DIR) $(BIN)/python -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton'
	PYTHONPATH=src:$(TRITON_DIR) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -k compile $(COMPILE_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test compile

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/vsa_cpu.py

clean:
	rm -rf $(VENV) sample.mp4 sample.png

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement constraints.txt
	touch $@

$(VENV)/.generate: pyproject.toml $(VENV)/.torch
	$(PIP) --constraint constraints.txt --editable ".[generate]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

$(TRITON_DIR)/.complete: $(VENV)/.dev
	rm -rf $(TRITON_DIR)
	$(PIP) --no-deps --target $(TRITON_DIR) triton==$(OLDEST_TRITON)
	touch $@
