# Two commands do everything on a machine with Python >= 3.11 and a Rust toolchain:
#   make demo   build the package into .venv and score the bundled rollouts
#   make test   build, lint, and run the Rust and Python tests
# Everything is incremental: a second run repeats only what its inputs changed. Packages come from requirements/, pinned with
# their hashes; `make lock` moves those pins, and `make test-newest` runs the tests without them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST_VERSION := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name '*.zlib' -o -name Cargo.toml)
WORKERS ?= 2
# The folder of the pins that are installed: demo.txt and test.txt.
PINS := requirements
COMPILE = $(BIN)/uv pip compile --quiet --no-build --generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command 'make $@'
UNIVERSAL := --universal --python-version 3.11 --fork-strategy fewest
REUSED := benchmarks/results/head-reused-memory.json

export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export HF_HUB_OFFLINE := 1
# Threads that spin while they wait starve the other test process of its core.
export OMP_WAIT_POLICY := PASSIVE
unexport PYTHONPATH
# The tests start hundreds of processes; without kept bytecode each of them compiles torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-newest attack soak lock build lint rust-checks python-checks rust-format rust-lint python-format \
	python-lint python-types stubs packages-check workflows rust-test python-test candle-cuda-check cuda-images-check \
	cuda-test cuda-images bench model-types format clean

# Two jobs: the packages arrive while the extension compiles.
demo: toolchain
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/.demo $(VENV)/.built
	$(BIN)/uv pip check
	$(BIN)/vhead demo

# The Python tests come last and alone, whatever -j says: they need both cores, and their summary ends the output.
test: toolchain
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/.test $(VENV)/.built
	@$(MAKE) --no-print-directory --jobs=2 rust-checks python-checks
	@$(MAKE) --no-print-directory python-test

# One after another: cargo would wait for itself. Compilers seldom use both cores, so that Python's checks run beside them.
rust-checks: toolchain
	@$(MAKE) --no-print-directory --jobs=1 rust-format rust-lint rust-test candle-cuda-check

python-checks: toolchain
	@$(MAKE) --no-print-directory --jobs=1 packages-check python-format python-lint python-types stubs workflows cuda-images-check

build: $(VENV)/.built

lint: packages-check rust-format rust-lint python-format python-lint python-types stubs workflows

# Whether what is installed is what vhead and all the rest of it ask for.
packages-check: $(VENV)/.test $(VENV)/.built
	$(BIN)/uv pip check

rust-format: toolchain
	cargo fmt --all --check

rust-lint: $(VENV)/.python
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings

python-format: $(VENV)/.test
	$(BIN)/ruff format --check .

python-lint: $(VENV)/.test
	$(BIN)/ruff check .

python-types: $(VENV)/.test
	$(BIN)/mypy

stubs: $(VENV)/.test $(VENV)/.built
	$(BIN)/stubtest --mypy-config-file pyproject.toml vhead._native

# The workflows' form, and what lets somebody else run code or read a token; actionlint too, on a machine that has it.
workflows: $(VENV)/.test
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	@if actionlint --version >/dev/null 2>&1; then set -x; actionlint; fi

rust-test: $(VENV)/.python
	cargo test --quiet --locked --workspace --doc
	@if cargo nextest --version >/dev/null 2>&1; then set -x; cargo nextest run --locked --workspace; \
	else set -x; cargo test --locked --workspace --lib --bins --tests; fi

# The crate's feature `cuda`, without a CUDA toolkit: over two minutes of processor time the first time, seconds from then on.
candle-cuda-check: $(VENV)/.python
	$(BIN)/python -m tools.candle_cuda_check

python-test: $(VENV)/.test $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

# The same on today's newest releases, in an environment of its own. It begins with those that are not the pinned ones.
test-newest: toolchain
	rm -rf .venv-newest
	@$(MAKE) --no-print-directory VENV=.venv-newest PINS=.venv-newest packages-check python-test

.venv-newest/test.txt: .venv-newest/.python
	$(COMPILE) pyproject.toml --all-extras --group build --output-file $@
	@echo 'Releases that differ from the pinned ones, and packages of other systems:'
	@cat requirements/test.txt $@ | sed -n 's/^\([^ ]*==[^ ]*\).*/  \1/p' | sort | uniq -u

# The attackers in their long form, for hours: mutated heads, folders and records, kills, races, signals.
attack: $(VENV)/.test $(VENV)/.built
	VHEAD_ATTACK_SCALE=long OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --timeout 0 tests/attack

# Handing weights over, in the long form: kills, corruptions, interrupts, the memory of workers that share; requests made of
# the OpenAPI document; and at last, alone, a server with too much to do, which prints the figures of docs/serve.md.
soak: $(VENV)/.test $(VENV)/.built
	VHEAD_ATTACK_SCALE=long OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --timeout 0 tests/attack/test_handing_over.py \
	  tests/attack/test_sharing.py tests/serve/test_openapi.py
	VHEAD_ATTACK_SCALE=long OMP_NUM_THREADS=1 $(BIN)/pytest --timeout 0 -rP tests/serve/test_soak.py

# Moves every pin to today's newest release; what the demo and the build need has the same pins as the whole.
lock: $(VENV)/.python
	$(COMPILE) $(UNIVERSAL) --upgrade pyproject.toml --all-extras --group build --output-file requirements/test.txt
	$(COMPILE) $(UNIVERSAL) --constraint requirements/test.txt pyproject.toml --extra cli --extra data \
		--output-file requirements/demo.txt
	$(COMPILE) $(UNIVERSAL) --constraint requirements/test.txt --group build --output-file requirements/build.txt

# Whether the embedded images are, byte by byte, what the compiler makes of the sources: under a minute.
cuda-images-check: $(VENV)/.test
	$(BIN)/python tools/cuda_images.py --check

# From the CUDA kernels' sources to executed PTX, on a machine without a GPU: under five minutes.
cuda-test: cuda-images-check $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) tests/cuda

# What rust/cuda embeds, and the tables of docs/cuda.md, from rust/cuda/kernels.
cuda-images: $(VENV)/.test
	$(BIN)/python tools/cuda_images.py
	$(BIN)/python tools/cuda_report.py

bench: $(VENV)/.test $(VENV)/.built
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/chart.py head
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 $(BIN)/python benchmarks/head.py --output $(REUSED)

# What docs/model-types.md says, found by running every model type of the installed transformers: about three minutes.
model-types: $(VENV)/.test $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.model_types_table --fresh

format: $(VENV)/.test
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-newest target dist

# The extension and the package, editable: changed Python needs no build, changed Rust builds again.
$(VENV)/.built: $(RUST_SOURCES) pyproject.toml $(VENV)/.python
	$(BIN)/python -m pip install --verbose --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(PINS)/%.txt $(VENV)/.python
	$(BIN)/uv pip install --quiet --no-build --require-hashes --requirement $<
	@touch $@

# Made anew when a pin moves, so that it holds the pins and nothing besides.
$(VENV)/.python: requirements/build.txt requirements/demo.txt requirements/test.txt | toolchain
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/build.txt
	@touch $@

.PHONY: toolchain
toolchain:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@found=$$(rustc --version 2>/dev/null | cut -d' ' -f2); \
	test -n "$$found" && printf '%s\n' "$(RUST_VERSION)" "$$found" | sort -C -V || \
	{ echo "error: Rust $(RUST_VERSION) or newer is needed, found '$${found:-none}': https://rustup.rs" >&2; exit 1; }
	@cargo --version >/dev/null 2>&1 || { echo "error: cargo is not on the PATH: https://rustup.rs" >&2; exit 1; }
