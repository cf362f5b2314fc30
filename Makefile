# Two commands do everything on a machine with Python >= 3.11 and a Rust toolchain:
#   make demo   build the package into .venv and score the bundled rollouts
#   make test   build, lint, and run the Rust and Python tests
# Everything is incremental: a second run repeats only what its inputs changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST_VERSION := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name '*.zlib' -o -name Cargo.toml)
WORKERS ?= 2
REUSED := benchmarks/results/head-reused-memory.json

export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export HF_HUB_OFFLINE := 1
# Threads that spin while they wait starve the other test process of its core.
export OMP_WAIT_POLICY := PASSIVE
unexport PYTHONPATH

.PHONY: demo test build lint rust-format rust-lint python-format python-lint python-types stubs rust-test python-test \
	candle-cuda-check cuda-images-check cuda-test cuda-images bench compatibility format clean

demo: $(VENV)/.built
	$(BIN)/vhead demo

# One after another, whatever -j says: the compilers and the tests share the cores, and the runners' summaries end the output.
test: toolchain
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory rust-test
	@$(MAKE) --no-print-directory candle-cuda-check
	@$(MAKE) --no-print-directory cuda-images-check
	@$(MAKE) --no-print-directory python-test

build: $(VENV)/.built

lint: rust-format rust-lint python-format python-lint python-types stubs

rust-format: toolchain
	cargo fmt --all --check

rust-lint: $(VENV)/.python
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings

python-format: $(VENV)/.dev
	$(BIN)/ruff format --check .

python-lint: $(VENV)/.dev
	$(BIN)/ruff check .

python-types: $(VENV)/.dev
	$(BIN)/mypy

stubs: $(VENV)/.dev $(VENV)/.built
	$(BIN)/stubtest --mypy-config-file pyproject.toml vhead._native

rust-test: $(VENV)/.python
	cargo test --quiet --locked --workspace --doc
	@if cargo nextest --version >/dev/null 2>&1; then set -x; cargo nextest run --locked --workspace; \
	else set -x; cargo test --locked --workspace --lib --bins --tests; fi

# The crate's feature `cuda`, without a CUDA toolkit: over two minutes of processor time the first time, seconds from then on.
candle-cuda-check: $(VENV)/.python
	$(BIN)/python tools/candle_cuda_check.py

python-test: $(VENV)/.dev $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

# Whether the embedded images are, byte by byte, what the compiler makes of the sources: under a minute.
cuda-images-check: $(VENV)/.dev
	$(BIN)/python tools/cuda_images.py --check

# From the CUDA kernels' sources to executed PTX, on a machine without a GPU: under five minutes.
cuda-test: cuda-images-check $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) tests/cuda

# What rust/cuda embeds, and the tables of docs/cuda.md, from rust/cuda/kernels.
cuda-images: $(VENV)/.dev
	$(BIN)/python tools/cuda_images.py
	$(BIN)/python tools/cuda_report.py

bench: $(VENV)/.dev $(VENV)/.built
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/chart.py
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 $(BIN)/python benchmarks/head.py --output $(REUSED)
	$(BIN)/python benchmarks/report.py $(REUSED)

# What docs/compatibility.md says, found by running every model type of the installed transformers: about three minutes.
compatibility: $(VENV)/.dev $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python tools/compatibility_table.py --fresh

format: $(VENV)/.dev
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) target dist

# The extension and the package, editable: changed Python needs no build, changed Rust builds again.
$(VENV)/.built: $(RUST_SOURCES) pyproject.toml $(VENV)/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'maturin>=1.12,<2'
	$(BIN)/maturin develop --release --locked --extras cli,data
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.built
	$(BIN)/maturin develop --release --locked --extras dev
	@touch $@

$(VENV)/.python: | toolchain
	$(PYTHON) -m venv $(VENV)
	@touch $@

.PHONY: toolchain
toolchain:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@found=$$(rustc --version 2>/dev/null | cut -d' ' -f2); \
	test -n "$$found" && printf '%s\n' "$(RUST_VERSION)" "$$found" | sort -C -V || \
	{ echo "error: Rust $(RUST_VERSION) or newer is needed, found '$${found:-none}': https://rustup.rs" >&2; exit 1; }
	@cargo --version >/dev/null 2>&1 || { echo "error: cargo is not on the PATH: https://rustup.rs" >&2; exit 1; }
