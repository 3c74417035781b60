# Two commands for a fresh clone with Python >= 3.10, pip, venv and make:
#   make generate   writes sample.mp4 and sample.png from a prompt
#   make test       runs the CPU test suite

PYTHON ?= python3
PROMPT ?= red heart moving left, green tree moving up on a navy background
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: generate test lint check bench clean

generate: $(VENV)/.generate
	$(BIN)/fastvideo generate --prompt "$(PROMPT)" --out sample.mp4

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test

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
