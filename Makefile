# make demo | test | check | bench. Each makes its own environment in $(VENV) first; only Python, git and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEMO_DIR ?= runs/demo
WORKERS ?= 2
# accelerate asks for each of these, or warns of the defaults that it took.
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
LAUNCH = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)

# Nothing here waits for the Hub: the demo's text ships with Python, the tests build what they need.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast check format bench gpu-check audit soak clean

help:
	@echo "make demo    train a small GLA model, load it in a new process without lalm, generate"
	@echo "make test    run the tests; make test-fast leaves out the slow ones (3 minutes on 2 cores)"
	@echo "make install make the environment only; make format applies the formatter"
	@echo "make check   linter, formatter, type checker, structure linter for model files, limits of size"
	@echo "make bench   run the benchmarks (20 minutes; BENCH='--quick' for less, BENCH='--list' names them)"
	@echo "make gpu-check  parity, speed and a short training on a GPU (6 minutes; WHEELS=folder installs without a network)"
	@echo "make audit   list the licences of all packages that lalm needs"
	@echo "make soak    train, kill, resume and generate for 20 minutes (SOAK='--minutes 3' for less)"
	@echo "make clean   remove $(VENV) and the tools' caches; runs/ stays"
	@echo "PYTHON=...   the Python (3.10 or newer) that makes $(VENV); now: $(PYTHON)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "lalm needs Python 3.10 or newer: make PYTHON=python3.12"; exit 2; }
	@echo "Installing lalm and its tools into $(VENV), once; this takes a few minutes."
	@$(PYTHON) -m venv $(VENV) || { echo "No venv could be made (on Debian: apt install python3-venv)."; exit 2; }
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Threads that spin while they wait make a busy machine many times slower; let them sleep.
demo: export OMP_WAIT_POLICY = PASSIVE
demo: $(STAMP)
	@$(LAUNCH) run_clm.py recipes/demo_gla.yaml --output_dir $(DEMO_DIR)
	@echo "Loading $(DEMO_DIR) in a new process that does not import lalm:"
	@$(BIN)/python -I experiments/generate_demo.py $(DEMO_DIR)

test-fast: SELECT = -m "not slow"
# One thread a worker: the models of the tests are tiny, and more threads slow them down.
test test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(SELECT)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/lint_models.py
	$(BIN)/python .ci/lint_sizes.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(BENCH)

# WHEELS names a folder of wheels, for a machine without a network.
gpu-check:
	@$(PYTHON) -m venv --system-site-packages $(VENV)
	@$(BIN)/python -m pip install --quiet $(if $(WHEELS),--no-index --find-links $(WHEELS)) --editable ".[gpu,dev]"
	$(BIN)/python -m experiments.gpu_check

audit: $(STAMP)
	$(BIN)/python .ci/audit.py

soak: $(STAMP)
	$(BIN)/python -m experiments.soak $(SOAK)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
