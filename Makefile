PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# One more than there are cores: some tests wait for other processes.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
READY := .venv/.ready
DOCS_READY := .venv/.ready-docs

.PHONY: quickstart test suite test-fast lint docs

unexport PYTHONDONTWRITEBYTECODE

quickstart: $(READY)
	$(BIN)/elit quickstart $(ARGS)

test: lint suite

# One thread and one core a worker.
suite: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 8

test-fast: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow'

# Strict: a warning, such as a link to nowhere, is an error. Building fetches nothing.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --output-format min-text

# Compiling all that is installed takes a minute or two; Python compiles what is imported, and may keep it (unexport).
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[docs]'
	touch $@
