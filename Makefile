# Targets for development. `make repro` runs the pipeline and `make test` the tests; both create .venv if it is missing.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-faults gpu-check scale lint format docs lock audit gallery federation-demo clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv from requirements.lock and install the project

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.lock --editable '.[dev]'
	touch $@

repro: $(STAMP)  ## Run the whole pipeline: data, features, JOBS (2) training runs at a time, report
	$(BIN)/dvc repro extract-features synthesize
	cores=$$($(PYTHON) -c 'import os; print(max(1, os.cpu_count() // $(JOBS)))') && \
	  changed=$$($(BIN)/dvc status train-fl) && echo "$$changed" | grep -o '^train-fl@[^:]*' | \
	  LOKY_MAX_CPU_COUNT=$$cores xargs -P $(JOBS) -I RUN $(BIN)/dvc --wait-for-lock repro --single-item RUN
	$(BIN)/dvc repro

test: $(STAMP)  ## Run the tests in parallel, in up to eight processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

test-faults: $(STAMP)  ## Run the long fault and fuzz tests (about 15 minutes) and print a table
	HYPOTHESIS_PROFILE=large OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/faults tests/fuzz tests/test_notebook.py

gpu-check:  ## Check and measure both stages on this machine's GPU (some minutes; no installation needed)
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_check.py

scale: $(STAMP)  ## Measure how time and memory grow with the data, and compare with bounds (some minutes, 2 GB)
	PYTHONPATH=. $(BIN)/python benchmarks/scale.py

lint: $(STAMP)  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code and apply ruff's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## Build the documentation into site/; open site/index.html, no server or network needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: $(STAMP)  ## Update requirements.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --extra dev --extra simulation --no-header --no-annotate pyproject.toml --output-file requirements.lock

audit: $(STAMP)  ## Check the locked packages for known vulnerabilities (needs network access)
	$(BIN)/uv tool run pip-audit --requirement requirements.lock --no-deps --disable-pip --strict

gallery: $(STAMP)  ## Regenerate the images of docs/gallery from the default settings (needs Chromium)
	$(BIN)/dvc repro
	$(BIN)/pipeline sweep-features
	install -m 644 analysis/*.svg analysis/sweep/sweep.svg results/feddifrc-dir005/s0/partition.svg \
	  data/features/digits-tiny-sd-t300/explained_variance.svg docs/gallery/
	install -m 644 $$(ls analysis/sweep/maps-*.png | head -n 1) docs/gallery/maps.png
	$(BIN)/python benchmarks/screenshot.py report/index.html docs/gallery/report.png

federation-demo: $(STAMP)  ## Run a federation of three local nodes, each with its own folder
	$(BIN)/python -m examples.federation.demo

clean:  ## Remove the state of unfinished work, cached latents and sweeps
	rm -rf .pipeline
